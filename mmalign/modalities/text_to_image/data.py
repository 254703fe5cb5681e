"""Pairs, caches and loaders of a recipe's image pairs and prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.config import ImageData, ImageJudgeModel, ImageSize, Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache, Fingerprint, cache_folder
from mmalign.data.caches.fill import fill
from mmalign.data.caches.latents import Edit, ImageViews, encode_latents, encode_texts
from mmalign.data.caches.precompute import PrecomputeCache
from mmalign.data.data_module import DataModule, Splits, open_loaders, summarize
from mmalign.data.formats.images import open_pairs as open_image_pairs
from mmalign.data.formats.labels import Margins
from mmalign.data.formats.prompts import open_prompts, unique_prompts
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.encoder import Encoder, text_key
from mmalign.data.loaders.image_pairs import ImagePairReader
from mmalign.data.loaders.prompts import PromptReader
from mmalign.data.loaders.sampler import check_max_bad
from mmalign.data.pairs import ImagePair, Pairs, SkippedRow, format_rows
from mmalign.data.shapes import Shapes, buckets, measure, summarize_cuts
from mmalign.data.splits import split
from mmalign.families.base import TextToImage
from mmalign.families.editing import not_editing
from mmalign.methods import Requirements
from mmalign.modalities import DataRequest
from mmalign.modalities.text_to_image.model import source_use
from mmalign.resources import locate

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def open_pairs(recipe: Recipe, needs: Requirements) -> Splits:
    """Return the recipe's image pairs or prompts, (training split, validation split or None), without decoding images.

    Raises:
        ValueError: files or columns are missing, more than `data.max_bad` rows are bad, or no pair remains.
    """
    data = recipe.data
    assert isinstance(data, ImageData)
    pairs = _open_prompts_or_pairs(recipe, data, needs)
    check_max_bad(pairs.skipped, data.max_bad, pairs.source)
    return split(pairs, data.validation_fraction, recipe.train.seed)


def _open_prompts_or_pairs(recipe: Recipe, data: ImageData, needs: Requirements) -> Pairs[Any]:
    """Open image pairs, or prompts from a file or from pairs for a method that generates its images."""
    path = locate(data.path)
    columns: dict[str, Any] = {"split": data.split, "columns": data.columns, "group_by": data.group_by}
    columns |= {"learning": needs.learning, "cut_pairs": data.cut_pairs, "labels": needs.labels}
    columns["images"] = Path(locate(data.images)) if data.images is not None else None
    # Prompts alone, from a text file or from pairs
    if needs.generates:
        if data.has_prompts_only:
            return open_prompts(path, data.limit)
        return unique_prompts(open_image_pairs(data.format, path, **columns), data.limit)
    if data.has_prompts_only:
        raise ValueError(
            "data.format: prompts has no images, and the method compares those of pairs; expected a file of pairs (spo "
            "generates its own images)"
        )
    why = None
    if needs.prompt_pairs:
        why = (
            f"method.name: {recipe.method.name} compares two images under two prompts; most methods take rows of one "
            "prompt"
        )
    # What only pairs of images have
    columns |= {"ties": needs.ties, "sources": source_use(recipe), "margins": Margins(data.margin, data.margin_scale)}
    if isinstance(recipe.model, ImageJudgeModel):
        columns["attributes"] = recipe.model.attributes
    return open_image_pairs(data.format, path, prompt_pairs=why, limit=data.limit, **columns)


def build_data_module(family: TextToImage, request: DataRequest) -> DataModule:
    """Return the loaders of a recipe's image pairs or prompts, with filled caches of latents and text."""
    recipe, splits, accelerator, needs, spec, reward_model = request
    data, output, seed = recipe.data, Path(recipe.output), recipe.train.seed
    assert isinstance(data, ImageData)
    sources = [pairs for pairs in splits if pairs is not None]
    encoders = dict(family.encoders())
    vae = encoders.pop("vae")
    size, batch_size = ImageSize.parse(data.resolution or family.resolution), recipe.train.batch_size
    transform = ImageTransform(data.crop, data.flip, pad=data.fit == "pad")
    is_cached = data.cache != "off" and data.crop == "center"  # random crops change every epoch
    shapes, views, edits = None, list[ImageViews](), list[ImageViews]()
    if not needs.generates:
        shapes = pair_shapes(sources, data, size, family.size_multiple, measured=is_cached)
        views = [ImageViews(pairs, shapes, transform) for pairs in sources]
        edits = views if check_sources(family, data, sources) else []
    # Text embeddings, cached or encoded in every batch
    family.place(*encoders.values())
    unconditional = None if edits else family.unconditional()
    text = _fill_text(family, encoders, sources, data, output, accelerator, edits) if data.cache != "off" else None
    encoder = Encoder(family, unconditional, text, needs.prompt_pairs, reward_model)
    open_all = partial(open_loaders, splits=splits, accelerator=accelerator, batch_size=batch_size, seed=seed)
    _warn_truncated(family, sources)
    # Prompts alone, for methods that generate their images
    unused = [] if text is not None else list(encoders.values())
    if shapes is None:
        shape = tuple(family.encode_images(torch.zeros(1, 3, size.height, size.width)).mean.shape[1:])
        encode = partial(encoder.encode_prompts, size=size, shape=shape)
        about = f"{len(splits[0]):,} prompts from {splits[0].source}."
        family.place(family.network, *([vae] if needs.vae_decoder else []), *unused)
        return DataModule(encode, *open_all(PromptReader()), about, text=text)

    # Latents, cached or encoded in every batch
    for line in summarize_cuts(shapes, sources, pad=transform.pad):
        logger.info(line)
    latents = precompute_cache = None
    if text is not None and is_cached:
        family.place(vae)
        latents = _fill_latents(family, views, data, output, accelerator, vae_decoder=needs.vae_decoder)
        if spec is not None:
            inputs = {**latents.fingerprint, **text.fingerprint, "flip": data.flip, "seed": seed}
            inputs["schedule"] = fingerprint.fingerprint_schedule(family.schedule)
            precompute_cache = PrecomputeCache.open(cache_folder(data, output), spec, inputs)
    family.place(family.network, *([vae] if latents is None or needs.vae_decoder else []), *unused)
    reader = ImagePairReader(shapes, transform, seed, latents, spec.num_draws if spec is not None else None)
    open_all = partial(open_all, num_workers=data.num_workers, max_bad=data.max_bad, liked_share=needs.liked_share)
    loaders = open_all(reader, shapes_of=shapes.of_all)
    return DataModule(encoder.encode, *loaders, summarize(splits), precompute_cache, latents=latents, text=text)


def check_sources(family: TextToImage, data: ImageData, sources: Sequence[Pairs[ImagePair]]) -> bool:
    """Return whether the text encoder sees the pairs' source images; log if an editing model trains without any.

    Raises:
        ValueError: the model does not edit, or random crops would change what a cached text has seen.
    """
    editing, has_source = family.editing, sources[0][0].source is not None
    if not has_source:
        if editing is not None:
            logger.info(f"{sources[0].source} has no source images: {family.name} trains on prompts alone")
        return False
    if editing is None:
        raise ValueError(f"data.columns: {not_editing(family.name, type(family).__name__)}")
    if editing.in_text and data.cache != "off" and data.crop == "random":
        raise ValueError(
            f"data.crop: random changes the source image, which the text encoder of {family.name} sees; use center, or "
            "data.cache: off"
        )
    return editing.in_text


def pair_shapes(
    sources: Sequence[Pairs[ImagePair]], data: ImageData, size: ImageSize, multiple: int, *, measured: bool = True
) -> Shapes:
    """Return the size of every pair's images; images are measured for buckets, and if `measured` is set."""
    options = buckets(size, multiple) if data.fit == "buckets" else (size,)
    measured = measured or data.fit == "buckets"
    return Shapes(options, {key: own for pairs in sources for key, own in measure(pairs).items()} if measured else {})


def _warn_truncated(family: TextToImage, sources: Sequence[Pairs[Any]]) -> None:
    """Warn how many prompts are longer than the text encoder reads."""
    prompts = sorted({prompt for pairs in sources for prompt in pairs.prompts()})
    cut = family.count_truncated(prompts)
    if cut:
        logger.warning(f"{cut:,} of {len(prompts):,} prompts exceed the text encoder's limit and are truncated")


def _fill_text(
    family: TextToImage,
    encoders: Mapping[str, nn.Module],
    sources: Sequence[Pairs[Any]],
    data: ImageData,
    output: Path,
    accelerator: Accelerator,
    edits: Sequence[ImageViews],
) -> ArrayCache:
    """Return the cache of text embeddings, filled; the text encoders, `encoders`, then move to the CPU.

    `edits` are the views of the pairs' sources, if the text encoder sees them.
    """
    depends = {name: fingerprint.fingerprint_network(net) for name, net in encoders.items()}
    depends["tokenizers"] = fingerprint.fingerprint_prompt_inputs(family.prompt_inputs())
    # The encoder sees the sources as they are cropped or padded, which their keys do not tell
    depends |= {"fit": data.fit} if edits else {}
    text = ArrayCache.open(cache_folder(data, output) / "text", depends)
    # Edits if the encoder sees their sources, else prompts; each process encodes its share
    wanted: dict[str, str | Edit] = {key: edit for views in edits for key, edit in views.edits()}
    if not edits:
        wanted = {text_key(prompt): prompt for pairs in sources for prompt in sorted(set(pairs.prompts()))}
    keys = text.share(wanted, rank=accelerator.process_index, world_size=accelerator.num_processes)
    steps = encode_texts(family, {key: wanted[key] for key in keys})
    fill(text, steps, len(keys), "encode prompts", accelerator)
    for net in encoders.values():
        net.to("cpu")  # no longer needed; on a GPU they would take gigabytes from the training
    return text


def _fill_latents(
    family: TextToImage,
    sources: Sequence[ImageViews],
    data: ImageData,
    output: Path,
    accelerator: Accelerator,
    *,
    vae_decoder: bool,
) -> ArrayCache:
    """Return the cache of latents, filled; the autoencoder then moves to the CPU unless its decoder is needed.

    Raises:
        ValueError: more than `data.max_bad` rows and images are bad, on all processes together.
    """
    from accelerate.utils import gather_object

    vae = dict(family.encoders())["vae"]
    size = str(sources[0].shapes.options[0])
    depends: Fingerprint = {"size": size, "fit": data.fit, "vae": fingerprint.fingerprint_network(vae)}
    latents, bad = ArrayCache.open(cache_folder(data, output) / "latents", depends), list[SkippedRow]()
    pairs = sources[0].pairs

    def on_bad(image: SkippedRow) -> None:
        bad.append(image)
        check_max_bad([*pairs.skipped, *bad], data.max_bad, pairs.source)

    # Each process encodes its share of what the cache lacks
    for views in sources:
        images = views.uncached(latents, rank=accelerator.process_index, world_size=accelerator.num_processes)
        decoded = views.read(latents, images, num_workers=data.num_workers)
        fill(latents, encode_latents(family, decoded, on_bad), len(images), "encode images", accelerator)
    bad = gather_object(bad)  # each process knows those of its own share
    check_max_bad([*pairs.skipped, *bad], data.max_bad, pairs.source)
    if bad:
        logger.warning(f"{len(bad)} images cannot be read; their pairs are skipped: {format_rows(bad)}")
    if not vae_decoder:
        vae.to("cpu")
    return latents
