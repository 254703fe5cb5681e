"""Reading of judged images, decoded or from the cache of latents.

B rows per batch of at most K images, of H x W pixels: [KB], the first image of every row, then the second ones. Pairs
have the chosen images first, then the rejected. A row with fewer images repeats its first one. An example with a source
has one more image, the source last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, ImageTransform, decode, image_key, is_flipped, prepare_pair
from mmalign.data.loaders.batches import by_side, collate_labels, pad_scores
from mmalign.data.loaders.loader import Loader
from mmalign.data.pairs import ImagePair, SkippedRow, pair_key
from mmalign.data.shapes import Shapes
from mmalign.losses.wrappers import Labels
from mmalign.rng import KeyedRNG

PIXELS = "pixels"
SAME_SIDES = "both images are the same"
SAME_LATENTS = 1e-4  # bound of differences in rounding between batches of the encoder
SIZES = "sizes"  # cache field with an image's micro-conditioning
MEAN = "mean"  # cache field with an image's latents
MIRRORED = "mirrored"  # a flag of the row, for the key of its source
SCORES = "scores"  # of each output, NaN for pairs

ImageExample = dict[str, Tensor]  # scores and flag of a row, and every field of its images, [K, ...]


@dataclass(frozen=True)
class SourceImages:
    """Source images of B pairs.

    Attributes:
        keys: the cache keys of the images as they were cut and mirrored [B].
        pixels: [B, 3, H, W] in [-1, 1]; None if the images come from a cache.
        latents: the means of their cached latents [B, C, h, w]; None if the images were decoded.
    """

    keys: list[str]
    pixels: Tensor | None
    latents: Tensor | None


@dataclass(frozen=True)
class ImagePairBatch:
    """Batch of B rows of images, not yet encoded.

    Attributes:
        rows: the pairs' ids [B].
        prompts: [B].
        rejected_prompts: the rejected images' prompts [B]; empty in a pair with one prompt.
        keys: the keys of the pairs' content [B], by `pair_key`.
        pixels: [KB, 3, H, W] in [-1, 1]; None if the images come from a cache.
        arrays: every field of the cached images, [KB, ...]; None if the images were decoded.
        sizes: [KB, 6] int64: original height and width, top and left of the crop, target height and width.
        weights: [B] float32; 0 for padding and for a row with a bad image.
        scores: [B, K], NaN beyond a row's last image; all NaN for pairs.
        sources: the images that the rows' images are edits of; None if there are none.
        labels: the labels of the pairs; None if no pair has one.
    """

    rows: list[int]
    prompts: list[str]
    rejected_prompts: list[str]
    keys: list[str]
    pixels: Tensor | None
    arrays: dict[str, Tensor] | None
    sizes: Tensor
    weights: Tensor
    scores: Tensor
    sources: SourceImages | None = None
    labels: Labels | None = None


@dataclass(frozen=True)
class ImagePairReader:
    """Reader of image pairs.

    Attributes:
        shapes: the size of every pair's images.
        transform: the cut to that size.
        seed: the seed of crops and flips.
        cache: the tensors of every good image, with a field "sizes", by `image_key`; None decodes the images.
        repeat: epochs after which a pair's crops and flips repeat; None draws new ones in every epoch.

    Raises:
        ValueError: random crops would have to come from a cache.
    """

    shapes: Shapes
    transform: ImageTransform
    seed: int
    cache: ArrayCache | None = None
    repeat: int | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.transform.crop == "random":
            raise ValueError("data.cache: random crops change every epoch; use data.crop: center, or data.cache: off")

    def read(self, pair: ImagePair, epoch: int) -> ImageExample | list[SkippedRow]:
        """Return the images of a row, cropped and flipped for the epoch, or the reasons to skip the row.

        Raises:
            ValueError: the cache lacks a good image.
        """
        rng = KeyedRNG(self.seed, epoch % self.repeat if self.repeat else epoch)
        u = rng.uniform([pair.row], (3,), "view")[0]
        example = self._decode(pair, u) if self.cache is None else self._look_up(pair, u, self.cache)
        if isinstance(example, list):
            return example
        if pair.source is not None:
            example[MIRRORED] = torch.tensor(is_flipped(self.transform.flip, u))
        return {**example, SCORES: torch.tensor(pair.scores or [torch.nan] * len(pair.outputs))}

    def _decode(self, pair: ImagePair, u: Tensor) -> ImageExample | list[SkippedRow]:
        # All bad images are named, not the first alone
        images, skipped = [], list[SkippedRow]()
        for ref in pair.images:
            try:
                images.append(decode(ref))
            except BadImage as error:
                skipped.append(error.skipped)
        # A pair of equal images, whatever their files, has nothing to prefer
        if not skipped and not pair.scores and _are_equal(*images[:2]):
            skipped = [SkippedRow(pair.location, SAME_SIDES, "same sides")]
        if skipped:
            return skipped
        # One draw for all images of a row: they get the same crop and flip
        pixels, sizes = prepare_pair(images, self.shapes.of(pair), self.transform, u)
        return {PIXELS: pixels, SIZES: sizes}

    def _look_up(self, pair: ImagePair, u: Tensor, cache: ArrayCache) -> ImageExample | list[SkippedRow]:
        # Keys name the mirrored view too, so that the draw selects a cached one
        mirror = is_flipped(self.transform.flip, u)
        refs, size = pair.images, self.shapes.of(pair)
        keys = [image_key(ref, size, mirror=mirror) for ref in refs]
        absent = [ref for ref, key in zip(refs, keys, strict=True) if key not in cache]
        if not absent:
            sides = [cache.get(key) for key in keys]
            if not pair.scores and _have_equal_latents(*sides[:2]):
                return [SkippedRow(pair.location, SAME_SIDES, "same sides")]
            return {field: torch.stack([side[field] for side in sides]) for field in sides[0]}
        # A bad image is named again, with its reason
        skipped = list[SkippedRow]()
        for ref in absent:  # only bad images may be missing from the cache
            try:
                decode(ref)
            except BadImage as error:
                skipped.append(error.skipped)
            else:
                raise ValueError(
                    f"data.cache: {cache.folder} lacks {ref.location}; encode the images again, or delete the folder"
                )
        return skipped

    def collate(self, pairs: Sequence[ImagePair], examples: Sequence[ImageExample], weights: Tensor) -> ImagePairBatch:
        """Return the batch of these rows, their first images first."""
        # Fields of the judged images [KB, ...], without the source behind them
        arrays = {
            field: torch.stack(by_side([x[field][: len(x[SCORES])].unbind() for x in examples]))
            for field in examples[0].keys() - {SCORES, MIRRORED}
        }
        # Pixels of decoded images, or fields of cached ones
        sizes, pixels = arrays.pop(SIZES), arrays.pop(PIXELS, None)
        return ImagePairBatch(
            rows=[pair.row for pair in pairs],
            prompts=[pair.prompt for pair in pairs],
            rejected_prompts=[pair.rejected_prompt for pair in pairs],
            keys=[pair_key(pair) for pair in pairs],
            pixels=pixels,
            arrays=arrays if pixels is None else None,
            sizes=sizes,
            weights=weights,
            scores=pad_scores([example[SCORES] for example in examples]),
            sources=self._sources(pairs, examples) if MIRRORED in examples[0] else None,
            labels=collate_labels(pairs),
        )

    def _sources(self, pairs: Sequence[ImagePair], examples: Sequence[ImageExample]) -> SourceImages:
        """Return the pairs' last images."""
        keys = [
            image_key(pair.images[-1], self.shapes.of(pair), mirror=bool(example[MIRRORED]))
            for pair, example in zip(pairs, examples, strict=True)
        ]
        field = PIXELS if self.cache is None else MEAN
        images = torch.stack([example[field][-1] for example in examples])
        return SourceImages(keys, images, None) if self.cache is None else SourceImages(keys, None, images)


def _are_equal(chosen: Image, rejected: Image) -> bool:
    return chosen.size == rejected.size and chosen.tobytes() == rejected.tobytes()


def _have_equal_latents(chosen: Mapping[str, Tensor], rejected: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(x, rejected[name], 0.0, SAME_LATENTS) for name, x in chosen.items() if name != SIZES)


ImagePairLoader = Loader[ImagePair, ImageExample, ImagePairBatch]
