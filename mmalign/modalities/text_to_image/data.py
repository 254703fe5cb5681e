"""Encoding and caching of a recipe's image pairs and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.config import ImageData
from mmalign.console import progress_bar
from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.fill import fill_latents, fill_text
from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.prompts import open_prompts, unique_prompts
from mmalign.data.loaders.encoder import Encoder, text_key
from mmalign.data.loaders.image_pairs import ImageTransform
from mmalign.data.loaders.sampler import check_max_bad_images
from mmalign.data.pairs import Pairs, SkippedRow, format_rows
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements
from mmalign.resources import locate
from mmalign.rewards import RewardModel

logger = logging.getLogger(__name__)


def _open_images(data: ImageData, common: dict[str, Any], method: str, needs: Requirements) -> Pairs[Any]:
    """Open image pairs, or prompts from a file or from pairs for a method that generates its images."""
    if needs.prompts_only:
        if data.format == "prompts":
            return open_prompts(locate(data.path), data.limit)
        return unique_prompts(open_pairs(data.format, locate(data.path), **{**common, "limit": None}), data.limit)
    if data.format == "prompts":
        raise ValueError(
            "data.format: prompts has no images, and the method compares those of pairs; expected pick_a_pic, folder "
            "or rankings (spo draws its own images)"
        )
    why = f"method.name: {method} compares two images under two prompts; most methods take rows of one prompt"
    return open_pairs(data.format, locate(data.path), prompt_pairs=why if needs.prompt_pairs else None, **common)


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
            share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
            for _ in fill_text(family, sorted(set(pairs.prompts())), text, **share):
                pass
            accelerator.wait_for_everyone()
            text.refresh()
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
    """Encode this process's share of what the caches lack, with a bar; return all processes' unreadable images."""
    from accelerate.utils import gather_object

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    bad: list[SkippedRow] = []
    with progress_bar(accelerator) as bar:
        for pairs in sources:
            task = bar.add_task("encode images", total=None)
            for image in fill_latents(family, pairs, transform, latents, num_workers=data.num_workers, **share):
                if isinstance(image, SkippedRow):
                    bad.append(image)
                    check_max_bad_images(bad, data.max_bad_images, pairs.source)
                bar.advance(task)
            prompts = sorted(set(pairs.prompts()))
            task = bar.add_task("encode prompts", total=len(text.share(map(text_key, prompts), **share)))
            for number in fill_text(family, prompts, text, **share):
                bar.advance(task, number)
            accelerator.wait_for_everyone()
            latents.refresh()
            text.refresh()
    bad = gather_object(bad)  # each process knows those of its own share
    check_max_bad_images(bad, data.max_bad_images, sources[0].source)
    return bad
