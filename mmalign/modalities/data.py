"""Pairs, caches and loaders of a recipe's data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config import Data, ImageData, ResponseData
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.image_features import feature_dependencies as feature_dependencies
from mmalign.data.caches.image_features import tokenizer_dependencies
from mmalign.data.caches.precompute import PrecomputeCache, PrecomputeSpec
from mmalign.data.data_module import DataModule, Loader, Splits
from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.image_pairs import ImagePairLoader
from mmalign.data.loaders.prompts import PromptLoader
from mmalign.data.loaders.response_pairs import RequestedInputs, ResponsePairLoader
from mmalign.data.loaders.response_pairs import encode as encode_responses
from mmalign.data.pairs import Pairs, split_by_group
from mmalign.families.base import TextToImage
from mmalign.families.step_judge import StepJudge
from mmalign.methods import Requirements, requirements_of
from mmalign.modalities.text_to_image.data import _open_images, _prepare, _prompt_encoder
from mmalign.resources import locate
from mmalign.rewards import RewardModel


def open_data(data: Data, seed: int, method: Any = None) -> Splits:
    """Return the recipe's pairs, (training split, validation split or None), without decoding an image.

    Args:
        data: the recipe's section.
        seed: seed of the validation split.
        method: configuration of the method that reads the pairs; None accepts any pairs.

    Raises:
        ValueError: files or columns are missing, no pair remains, or none has the other images that the method needs.
    """
    common: dict[str, Any] = {
        "split": data.split,
        "columns": data.columns,
        "group_by": data.group_by,
        "limit": data.limit,
    }
    pairs: Pairs[Any]
    needs = Requirements() if method is None else requirements_of(method)
    if isinstance(data, ResponseData):
        images = Path(data.images) if data.images is not None else None
        pairs = open_responses(data.format, locate(data.path), images=images, **common)
        if needs.other_images and not any(pair.other_images for pair in pairs):
            raise ValueError(
                f"data.path: {pairs.source} has no other images, and method.name: {method.name} compares what "
                "is said of an image with the same words about another; use data.format: realign, whose rows "
                "have a retrieved_image"
            )
    else:
        assert isinstance(data, ImageData)
        pairs = _open_images(data, common, method.name if method is not None else "", needs)
    return split_by_group(pairs, data.validation_fraction, seed) if data.validation_fraction else (pairs, None)


def build_data_module(
    family: Any,
    data: Data,
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
    """Open the recipe's pairs, and for image data fill the caches of latents and text.

    Args:
        family: a TextToImage for ImageData, or a StepJudge with one; a VisionLanguage for ResponseData.
        data: the recipe's section.
        output: the run's folder, which holds the caches under `data.cache: auto`.
        batch_size: pairs of a batch on each process.
        seed: seed of order, crops, flips and the validation split.
        accelerator: the accelerator, for this process's index.
        method: configuration of the method that reads the batches; None if it needs only pairs.
        splits: the result of `open_data`, if the caller has checked the data before loading the family.
        spec: the tensors that are precomputed for the method; the command `cache` fills their cache.
        reward_model: the model that scores images, for methods whose settings name one.

    Raises:
        ValueError: files, columns or caches do not fit, more than `data.max_bad_images` images are bad, or all pairs
            are bad.
    """
    needs = Requirements() if method is None else requirements_of(method)
    train, validation = splits or open_data(data, seed, method)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    common |= {"num_workers": data.num_workers, "max_bad_images": data.max_bad_images}
    about = train.summary() + (f" {len(validation):,} more are held out." if validation is not None else "")
    make: Callable[..., Loader]
    encode: Callable[[Any], Any]
    precompute_cache = features = None
    caches = list[ArrayCache]()
    together = {"seed": seed, "batch_size": batch_size, "processes": share["world_size"], "pairs": len(train)}

    # Loader and caches of response pairs
    if isinstance(data, ResponseData):
        longest = min(family.processor.max_length, data.max_length or family.processor.max_length)
        if data.cache != "off":
            folder = cache_folder(data, output)
            of_features = feature_dependencies(family)
            features = ArrayCache.open(folder / "features", of_features)
            caches.append(features)
            if spec is not None:
                settings = {
                    **of_features,
                    **tokenizer_dependencies(family),
                    **spec.settings,
                    **together,
                    "max_length": longest,
                }
                precompute_cache = PrecomputeCache(ArrayCache.open(folder / spec.folder, settings), spec)
        requested = RequestedInputs(needs.decoded_images, needs.other_images)
        make = partial(
            ResponsePairLoader,
            processor=family.processor,
            max_length=longest,
            requested=requested,
            known=features,
            **common,
        )
        encode = partial(encode_responses, family, max_length=longest)
    else:
        # Loader and caches of image pairs or prompts
        assert isinstance(data, ImageData)
        sources = [train] if validation is None else [train, validation]
        painter: TextToImage = family.denoiser if isinstance(family, StepJudge) else family
        if needs.prompts_only:
            about = f"{len(train):,} prompts from {train.source}."
            make = partial(PromptLoader, batch_size=batch_size, seed=seed)
            encoder, encode = _prompt_encoder(painter, sources, data, output, accelerator, reward_model)
        else:
            transform, latents, encoder, depends = _prepare(
                painter, sources, data, output, accelerator, needs.vae_decoder
            )
            make = partial(
                ImagePairLoader, transform=transform, cache=latents, repeat=spec.num_draws if spec else None, **common
            )
            caches += [latents] if latents is not None else []
            if spec is not None and latents is not None:
                settings = {**depends, **spec.settings, "flip": data.flip, **(together if spec.scores else {})}
                spec_folder = cache_folder(data, output) / spec.folder
                precompute_cache = PrecomputeCache(ArrayCache.open(spec_folder, {**settings, "seed": seed}), spec)
            encode = replace(encoder, reward_model=reward_model, prompt_pairs=needs.prompt_pairs).encode
        caches += [encoder.text] if encoder.text is not None else []
    caches += [precompute_cache.cache] if precompute_cache is not None else []
    loader = make(pairs=train, **share)
    # Every process scores the whole validation split, so that all have the same number.
    scored = make(pairs=validation, keep_last=True) if validation is not None else None
    for checked in (loader, scored):
        if checked is not None:
            checked.check_readable()
    return DataModule(encode, loader, scored, about, precompute_cache, features, tuple(caches))
