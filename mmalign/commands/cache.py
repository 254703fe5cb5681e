"""The command `cache`: precompute latents, text embeddings, image features and reference scores.

The caches of latents and text, or of image features, come first, then the tensors that the method precomputes. They
cover the pairs that the recipe's training reads, and the processes of a launch share the work. Stored entries are
never computed again, so a stopped command resumes. `mmalign train` fills the same caches before its first update.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign import atomic_io, methods
from mmalign.commands import preflight
from mmalign.config import Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import cache_folder
from mmalign.data.caches.fill import fill
from mmalign.data.caches.image_features import fill_features
from mmalign.data.data_module import DataModule, Splits
from mmalign.data.loaders.response_pairs import ResponsePairLoader, ResponsePairReader
from mmalign.data.pairs import ImageRef
from mmalign.families.vlm.image_features import backend_name, move_parameters
from mmalign.modalities import DataRequest, loading, modality_of
from mmalign.policy import FrozenCopy, Policy
from mmalign.rng import KeyedRNG
from mmalign.training.launch import GOES_ON, connect, name_lost_processes
from mmalign.training.run import MAX_VALIDATION_BATCHES

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def cache(recipe: Recipe) -> Path:
    """Fill the caches that the recipe's training reads, and log their sizes.

    Returns:
        The folder of the caches.

    Raises:
        ValueError: the recipe or the data is invalid, nothing can be cached, or the launched processes do not know of
            one another.
    """
    if recipe.data.cache == "off":
        raise ValueError("data.cache: off writes no cache; leave it out, or give a folder")
    # Pairs and model, as for training
    begun = time.time()
    preflight.check(recipe, "training")
    splits = modality_of(recipe).open_pairs(recipe, methods.requirements_of(recipe.method))
    output = atomic_io.make_folder("output", Path(recipe.output))
    accelerator = connect(recipe.limits.rank_timeout)
    with atomic_io.folder_lock(output), name_lost_processes(recipe.limits.rank_timeout, lambda: GOES_ON):
        family = loading.load_for_training(recipe, accelerator.device)
        data_module = build_filled_data_module(recipe, family, accelerator=accelerator, splits=splits)
    folder = cache_folder(recipe.data, output)
    if accelerator.is_main_process:
        logger.info(f"cache: {folder}: {_summary(folder, {cache.folder for cache in data_module.caches}, begun)}")
    accelerator.end_training()
    return folder


def build_filled_data_module(
    recipe: Recipe, family: Any, *, accelerator: Accelerator, splits: Splits, reward_model: Any = None
) -> DataModule:
    """Return the recipe's pairs in batches, with all caches filled for the pairs that its training reads.

    As loaded, the family's network is the reference.

    Raises:
        ValueError: `build_data_module` refuses the data or its caches.
    """
    # Settings that reference scores depend on
    options, needs = recipe.train, methods.requirements_of(recipe.method)
    run = {"precision": options.precision, "attention": backend_name(family.network), "pack": options.pack_responses}
    run |= {"compile": "on"} if options.compile else {}  # compiled blocks round differently
    spec = needs.precompute
    if spec is not None and recipe.data.cache != "off":
        run |= {"model": fingerprint.fingerprint_network(family.network)}
    if spec is not None:
        spec = replace(spec, settings={**spec.settings, "method": recipe.method.name, **run})
    request = DataRequest(recipe, splits, accelerator, needs, spec, reward_model)
    data_module = modality_of(recipe).build_data_module(family, request)
    data_module = _fill_caches(data_module, recipe, family, accelerator)
    if replaces_reference(data_module):
        assert data_module.precompute_cache is not None
        # A sharded reference cannot compute missing scores on one process alone
        no_reference = recipe.model.tune == "full" or recipe.train.sharding != "none"
        needed = _stop_decoding_images(data_module, recipe) or no_reference
        data_module = replace(data_module, precompute_cache=replace(data_module.precompute_cache, required=needed))
    return data_module


def _fill_caches(data_module: DataModule, recipe: Recipe, family: Any, accelerator: Accelerator) -> DataModule:
    """Fill the caches of image features and precomputed tensors; drop that of features if the disk is too small."""
    num_batches = recipe.train.steps * recipe.train.gradient_accumulation_steps
    # A batch of unreadable pairs makes no update, so training reads a further one, which needs its entries as well
    planned, needed = 0, num_batches
    while planned < needed:
        planned = needed
        if data_module.features is not None and not _fill_features(data_module, recipe, family, planned, accelerator):
            logger.warning(
                f"the images' features would take more than half of the free disk of {data_module.features.folder} and "
                "are not cached; set data.cache to another folder to cache them"
            )
            data_module = replace(data_module, features=None)
        if data_module.precompute_cache is not None:
            _fill_precomputed(data_module, recipe, family, planned, accelerator)
            loader, store = data_module.train_loader, data_module.precompute_cache
            needed = store.num_batches_read(loader, store.required_keys(loader, planned), num_batches)
    return data_module


def _stop_decoding_images(data_module: DataModule, recipe: Recipe) -> bool:
    """Stop decoding images that only the reference needed; return whether any loader decoded such images."""
    if methods.requirements_of(recipe.method).vision_tower:
        return False
    stopped = False
    for loader in (data_module.train_loader, data_module.validation_loader):
        if loader is not None and isinstance(loader.reader, ResponsePairReader) and loader.reader.decoded_images:
            loader.reader, stopped = replace(loader.reader, decoded_images=False), True
    return stopped


def replaces_reference(data_module: DataModule) -> bool:
    """Return whether the cache replaces the reference: it holds all scores that the method needs."""
    return data_module.precompute_cache is not None and data_module.precompute_cache.spec.scores


def offload_encoders(data_module: DataModule, recipe: Recipe, family: Any) -> None:
    """Move the vision tower to the CPU if its features are cached and the method does not need it."""
    if data_module.features is not None and not methods.requirements_of(recipe.method).vision_tower:
        for _, net in family.encoders():
            move_parameters(net, torch.device("cpu"))


def _fill_features(
    data_module: DataModule, recipe: Recipe, family: Any, num_batches: int, accelerator: Accelerator
) -> bool:
    """Fill the cache of image features; return False if the disk has no room for them."""
    assert data_module.features is not None
    images = (image for loader, number in _loaders(data_module, num_batches) for image in _images(loader, number))
    return fill_features(family, images, data_module.features, accelerator, num_workers=recipe.data.num_workers)


def _images(loader: ResponsePairLoader, num_batches: int) -> Iterator[ImageRef]:
    """Yield the images of the pair that replaces bad ones, and of each pair in the first batches once."""
    assert isinstance(loader.reader, ResponsePairReader)
    yield from loader.reader.images_of(loader.check_readable())
    for _, number in loader.sampler.taken(num_batches):
        yield from loader.reader.images_of(loader.pairs[number])


def _fill_precomputed(
    data_module: DataModule, recipe: Recipe, family: Any, num_batches: int, accelerator: Accelerator
) -> None:
    """Precompute the method's missing tensors with the network as loaded."""
    store = data_module.precompute_cache
    assert store is not None
    method, net = methods.find(recipe.method.name), family.network
    # As loaded, the network is the reference
    base = Policy(family, net, net, FrozenCopy(net))

    @torch.no_grad()
    def compute(batch: Any, epoch: int) -> dict[str, Tensor]:
        rng = KeyedRNG(recipe.train.seed, epoch)
        return methods.compute_precomputed(method, base, data_module.encode(batch), recipe.method, rng)

    for loader, number in _loaders(data_module, num_batches):
        required = store.required_keys(loader, number)
        # Each process computes its share of the missing entries
        missing = store.missing(required, rank=accelerator.process_index, world_size=accelerator.num_processes)
        total = sum(len(loader.sampler.split(numbers)) for numbers in missing.values())
        fill(store.cache, store.compute(loader, missing, compute), total, "precompute", accelerator)


def _loaders(data_module: DataModule, batches: int) -> list[tuple[Any, int]]:
    """Return the loaders of a training, each with the number of batches to read."""
    loaders = [(data_module.train_loader, batches)]
    if (held_out := data_module.validation_loader) is not None:
        loaders.append((held_out, min(MAX_VALIDATION_BATCHES, len(held_out))))
    return loaders


def _summary(folder: Path, used: set[Path], begun: float) -> str:
    """Describe a recipe's caches: sizes by kind, the new part, and folders of other settings."""
    files = {path: path.stat() for path in sorted(folder.rglob("*.safetensors"))}
    # Files that this recipe reads
    used_files = {path: file for path, file in files.items() if path.parent in used}
    kinds = dict.fromkeys(path.relative_to(folder).parts[0] for path in used_files)
    sizes = {
        kind: sum(file.st_size for path, file in used_files.items() if folder / kind in path.parents) for kind in kinds
    }
    description = ", ".join(f"{kind} {_size(size)}" for kind, size in sizes.items()) or "nothing"
    new = sum(file.st_size for file in used_files.values() if file.st_mtime >= begun)
    description += f"; {_size(sum(sizes.values()))} in all, {_size(new)} of it new"
    # Files in the same folder that other settings have left
    others = [path for path in files if path not in used_files]
    if not others:
        return description
    folders = dict.fromkeys(str(path.parent.relative_to(folder)) for path in others)
    size = sum(files[path].st_size for path in others)
    return f"{description}; of no use to this recipe: {_size(size)} of other settings in {', '.join(folders)}"


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"
