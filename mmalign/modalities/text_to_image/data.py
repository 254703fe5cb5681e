"""Pairs, caches and loaders of a recipe's image pairs and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.config import ImageData
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.fill import fill
from mmalign.data.caches.latents import encode_latents, encode_texts, read_images, uncached_images
from mmalign.data.caches.precompute import PrecomputeCache, PrecomputeSpec
from mmalign.data.data_module import DataModule, Splits, open_loaders
from mmalign.data.formats.images import open_pairs as open_image_pairs
from mmalign.data.formats.prompts import open_prompts, unique_prompts
from mmalign.data.loaders.encoder import Encoder, text_key
from mmalign.data.loaders.image_pairs import ImagePairLoader, ImageTransform
from mmalign.data.loaders.prompts import PromptLoader
from mmalign.data.loaders.sampler import check_max_bad_images
from mmalign.data.pairs import Pairs, SkippedRow, format_rows, split_by_group
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, requirements_of
from mmalign.resources import locate
from mmalign.rewards import RewardModel

logger = logging.getLogger(__name__)


def open_pairs(data: ImageData, seed: int, method: Any = None) -> Splits:
    """Return the recipe's image pairs or prompts, (training split, validation split or None), without decoding images.

    Args:
        data: the recipe's section.
        seed: seed of the validation split.
        method: configuration of the method that reads the pairs; None accepts any pairs.

    Raises:
        ValueError: files or columns are missing, or no pair remains.
    """
    pairs = _open_prompts_or_pairs(data, method)
    return split_by_group(pairs, data.validation_fraction, seed) if data.validation_fraction else (pairs, None)


def _open_prompts_or_pairs(data: ImageData, method: Any) -> Pairs[Any]:
    """Open image pairs, or prompts from a file or from pairs for a method that generates its images."""
    needs = Requirements() if method is None else requirements_of(method)
    path = locate(data.path)
    columns: dict[str, Any] = {"split": data.split, "columns": data.columns, "group_by": data.group_by}
    if needs.prompts_only:
        if data.format == "prompts":
            return open_prompts(path, data.limit)
        return unique_prompts(open_image_pairs(data.format, path, **columns), data.limit)
    if data.format == "prompts":
        raise ValueError(
            "data.format: prompts has no images, and the method compares those of pairs; expected pick_a_pic, folder "
            "or rankings (spo draws its own images)"
        )
    why = None
    if needs.prompt_pairs:
        why = f"method.name: {method.name} compares two images under two prompts; most methods take rows of one prompt"
    return open_image_pairs(data.format, path, prompt_pairs=why, limit=data.limit, **columns)


def build_data_module(
    family: TextToImage,
    data: ImageData,
    *,
    output: Path,
    batch_size: int,
    seed: int,
    accelerator: Any,
    method: Any = None,
    splits: Splits | None = None,
    spec: PrecomputeSpec | None = None,
    reward_model: RewardModel | None = None,
) -> DataModule:
    """Return the loaders of a recipe's image pairs or prompts, with filled caches of latents and text.

    Args:
        family: the model, whose frozen encoders fill the caches.
        data: the recipe's section.
        output: the run's folder, which holds the caches under `data.cache: auto`.
        batch_size: pairs of a batch on each process.
        seed: seed of order, crops, flips and the validation split.
        accelerator: the accelerator, for this process's index.
        method: configuration of the method that reads the batches; None if it needs only pairs.
        splits: the result of `open_pairs`, if the caller has checked the data before loading the family.
        spec: the tensors that are precomputed for the method; the command `cache` fills their cache.
        reward_model: the model that scores images, for methods whose settings name one.

    Raises:
        ValueError: files, columns or caches do not fit, more than `data.max_bad_images` images are bad, or all are.
    """
    needs = Requirements() if method is None else requirements_of(method)
    train, validation = splits or open_pairs(data, seed, method)
    sources = [train] if validation is None else [train, validation]
    if needs.prompts_only:
        prompts = partial(PromptLoader, batch_size=batch_size, seed=seed)
        encoder, encode = _prompt_encoder(family, sources, data, output, accelerator, reward_model)
        loaders = open_loaders(prompts, train, validation, accelerator)
        text = (encoder.text,) if encoder.text is not None else ()
        return DataModule(encode, *loaders, f"{len(train):,} prompts from {train.source}.", caches=text)

    # Caches of latents and text, then that of the precomputed tensors
    transform, latents, encoder, depends = _prepare(family, sources, data, output, accelerator, needs.vae_decoder)
    precompute_cache = None
    if spec is not None and latents is not None:
        settings = {**depends, **spec.settings, "flip": data.flip, "seed": seed}
        spec_folder = cache_folder(data, output) / spec.folder
        precompute_cache = PrecomputeCache(ArrayCache.open(spec_folder, settings), spec)
    make = partial(
        ImagePairLoader,
        batch_size=batch_size,
        seed=seed,
        transform=transform,
        cache=latents,
        repeat=spec.num_draws if spec else None,
        num_workers=data.num_workers,
        max_bad_images=data.max_bad_images,
    )
    caches = (latents, encoder.text, precompute_cache.cache if precompute_cache is not None else None)
    return DataModule(
        replace(encoder, reward_model=reward_model, prompt_pairs=needs.prompt_pairs).encode,
        *open_loaders(make, train, validation, accelerator),
        train.summary() + (f" {len(validation):,} more are held out." if validation is not None else ""),
        precompute_cache,
        caches=tuple(cache for cache in caches if cache is not None),
    )


def _prompt_encoder(
    family: TextToImage,
    sources: Sequence[Pairs[Any]],
    data: ImageData,
    output: Path,
    accelerator: Any,
    reward_model: RewardModel | None,
) -> tuple[Encoder, Callable[[Any], Any]]:
    """Fill the text cache; return the encoder of prompts, and its call for a batch at the recipe's image size."""
    side = data.resolution or family.resolution
    shape = tuple(family.encode_images(torch.zeros(1, 3, side, side)).mean.shape[1:])
    encoder = Encoder(family, family.unconditional(), None, reward_model=reward_model)
    if data.cache != "off":
        networks = {name: net for name, net in family.encoders() if name != "vae"}
        text = ArrayCache.open(cache_folder(data, output) / "text", _text_dependencies(family))
        for pairs in sources:
            _fill_text(family, pairs, text, accelerator)
        for net in networks.values():
            net.to("cpu")
        encoder = replace(encoder, text=text)
    _warn_truncated(family, sources)
    return encoder, partial(encoder.encode_prompts, side=side, shape=shape)


def _text_dependencies(family: TextToImage) -> dict[str, str | int | float]:
    """Return the dependencies of text embeddings besides the prompts: text encoders and tokenizers."""
    encoders = {name: fingerprint.fingerprint_network(net) for name, net in family.encoders() if name != "vae"}
    return {**encoders, "tokenizers": fingerprint.fingerprint_tokenizer(family)}


def _warn_truncated(family: TextToImage, sources: Sequence[Pairs[Any]]) -> None:
    """Warn how many prompts are longer than the text encoder reads."""
    prompts = sorted({prompt for pairs in sources for prompt in pairs.prompts()})
    cut = family.count_truncated(prompts)
    if cut:
        logger.warning(f"{cut:,} of {len(prompts):,} prompts are longer than the text encoder reads, and are cut")


def _prepare(
    family: TextToImage,
    sources: Sequence[Pairs],
    data: ImageData,
    output: Path,
    accelerator: Any,
    decodes: bool = False,
) -> tuple[ImageTransform, ArrayCache | None, Encoder, dict[str, str | int | float]]:
    """Fill the caches of latents and text.

    The encoders then move to the CPU, except the autoencoder of a method that `decodes`.

    Returns:
        The image transform, the cache of latents, the encoder of batches, and the caches' dependencies. Without a cache
        or with random crops, the cache is None and the dependencies are empty.
    """
    transform = ImageTransform(data.resolution or family.resolution, data.crop, data.flip)
    latents, text, bad = None, None, list[SkippedRow]()
    depends: dict[str, str | int | float] = {}
    unconditional = family.unconditional()
    if data.cache != "off" and data.crop == "center":
        of_text = _text_dependencies(family)
        of_images: dict[str, str | int | float] = {"resolution": transform.resolution}
        of_images["vae"] = fingerprint.fingerprint_network(dict(family.encoders())["vae"])
        depends |= {**of_text, **of_images, "schedule": fingerprint.fingerprint_schedule(family.schedule)}
        latents = ArrayCache.open(cache_folder(data, output) / "latents", of_images)
        text = ArrayCache.open(cache_folder(data, output) / "text", of_text)
        bad = _fill(family, sources, transform, latents, text, data, accelerator)
        for name, net in family.encoders():
            if not (decodes and name == "vae"):
                net.to("cpu")  # no longer needed; on a GPU they would take gigabytes from the training
    if bad:
        logger.warning(f"{len(bad)} images cannot be read, and their pairs are left out: {format_rows(bad)}")
    _warn_truncated(family, sources)
    return transform, latents, Encoder(family, unconditional, text), depends


def _fill(
    family: TextToImage,
    sources: Sequence[Pairs],
    transform: ImageTransform,
    latents: ArrayCache,
    text: ArrayCache,
    data: ImageData,
    accelerator: Any,
) -> list[SkippedRow]:
    """Encode the images and prompts that the caches lack; return all processes' unreadable images."""
    from accelerate.utils import gather_object

    bad: list[SkippedRow] = []
    for pairs in sources:

        def on_bad(image: SkippedRow, source: str = pairs.source) -> None:
            bad.append(image)
            check_max_bad_images(bad, data.max_bad_images, source)

        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        images = uncached_images(pairs, transform, latents, **share)
        views = read_images(pairs, transform, latents, images, num_workers=data.num_workers)
        fill(latents, encode_latents(family, views, on_bad), len(images), "encode images", accelerator)
        _fill_text(family, pairs, text, accelerator)
    bad = gather_object(bad)  # each process knows those of its own share
    check_max_bad_images(bad, data.max_bad_images, sources[0].source)
    return bad


def _fill_text(family: TextToImage, pairs: Pairs[Any], text: ArrayCache, accelerator: Any) -> None:
    """Encode the pairs' prompts that the cache of text lacks."""
    prompts = {text_key(prompt): prompt for prompt in sorted(set(pairs.prompts()))}
    keys = text.share(prompts, rank=accelerator.process_index, world_size=accelerator.num_processes)
    fill(text, encode_texts(family, [prompts[key] for key in keys]), len(keys), "encode prompts", accelerator)
