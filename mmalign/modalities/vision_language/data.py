"""Pairs, caches and loaders of a recipe's response pairs."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from mmalign.config import Recipe, ResponseData
from mmalign.data.caches.array_cache import ArrayCache, cache_folder
from mmalign.data.caches.image_features import feature_dependencies, tokenizer_dependencies
from mmalign.data.caches.precompute import PrecomputeCache
from mmalign.data.data_module import DataModule, Splits, open_loaders, summarize
from mmalign.data.formats.labels import Margins
from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.response_pairs import ResponsePairReader
from mmalign.data.loaders.response_pairs import encode as encode_responses
from mmalign.data.loaders.sampler import check_max_bad
from mmalign.data.splits import split
from mmalign.families.base import VisionLanguage
from mmalign.methods import Requirements
from mmalign.modalities import DataRequest, loading
from mmalign.modalities.vision_language.model import token_limit
from mmalign.resources import locate

logger = logging.getLogger(__name__)


def open_pairs(recipe: Recipe, needs: Requirements) -> Splits:
    """Return the recipe's response pairs, (training split, validation split or None), without decoding an image.

    Raises:
        ValueError: files or columns are missing, no pair remains, or none has the rejected responses or the other
            images that the method needs.
    """
    data = recipe.data
    assert isinstance(data, ResponseData)
    pairs = open_responses(
        data.format,
        locate(data.path),
        images=Path(locate(data.images)) if data.images is not None else None,
        split=data.split,
        columns=data.columns,
        group_by=data.group_by,
        limit=data.limit,
        margins=Margins(data.margin, data.margin_scale),
        labels=needs.labels,
        learning=needs.learns_from,
        cut_pairs=data.cut_pairs,
        truths=needs.generates and needs.reward is not None and loading.needs_truths(needs.reward),
    )
    check_max_bad(pairs.skipped, data.max_bad, pairs.source)
    # Rejected responses, for whatever compares with them
    comparing = [f"method.name: {recipe.method.name}"] if needs.rejected else []
    comparing += ["evaluate.benchmark: implicit"] if recipe.evaluate and recipe.evaluate.benchmark == "implicit" else []
    if comparing and not pairs[0].rejected and needs.learns_from == "pairs":
        raise ValueError(
            f"data.path: {pairs.source} has answers alone, and {comparing[0]} compares them with rejected ones; "
            "`mmalign prepare` generates these, and response_sft trains on answers alone"
        )
    if needs.other_images and not any(pair.other_images for pair in pairs):
        raise ValueError(
            f"data.path: {pairs.source} has no other images, and method.name: {recipe.method.name} compares a response "
            "to an image with the same response to another image; use data.format: realign, whose rows have a "
            "retrieved_image"
        )
    return split(pairs, data.validation_fraction, recipe.train.seed)


def build_data_module(family: VisionLanguage, request: DataRequest) -> DataModule:
    """Return the loaders of a recipe's response pairs, with opened caches of features and precomputed tensors."""
    recipe, splits, accelerator, needs, spec, judge = request
    data, seed = recipe.data, recipe.train.seed
    assert isinstance(data, ResponseData)
    longest = token_limit(family.processor, data)
    # Caches of image features and of precomputed values
    precompute_cache = features = None
    if data.cache != "off":
        folder = cache_folder(data, Path(recipe.output))
        of_images = feature_dependencies(family)
        if loading.adapts_images(family, recipe):
            logger.info("image features are not cached: model.lora.targets has layers that compute them")
        else:
            features = ArrayCache.open(folder / "features", of_images)
        if spec is not None:
            of_tokens = {**tokenizer_dependencies(family), "max_length": longest}
            precompute_cache = PrecomputeCache.open(folder, spec, {**of_images, **of_tokens, "seed": seed})
    # Loaders of both splits
    if needs.new_tokens >= longest:
        raise ValueError(
            f"method.generation.max_new_tokens: {needs.new_tokens:,} leaves no room for a prompt in {longest:,} tokens "
            "(the model's limit, or data.max_length); lower it"
        )
    # What the method generates needs room after the prompt
    prompts = longest - needs.new_tokens
    reader = ResponsePairReader(family.processor, prompts, needs.decoded_images, needs.other_images, features)
    loaders = open_loaders(
        reader,
        splits,
        accelerator,
        batch_size=recipe.train.batch_size,
        seed=seed,
        num_workers=data.num_workers,
        max_bad=data.max_bad,
        liked_share=needs.liked_share,
    )
    return DataModule(
        partial(encode_responses, family, max_length=longest, judge=judge),
        *loaders,
        f"{len(splits[0]):,} prompts from {splits[0].source}." if needs.generates else summarize(splits),
        precompute_cache,
        features,
    )
