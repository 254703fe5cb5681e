"""Reading of judged images for a judge in training: preprocessed, or as features that are computed once.

B rows per batch of at most K images: [KB], the first image of every row, then the second ones. A row with fewer images
repeats its first one. S is the side of the judge's input image, D the width of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.fill import Items, in_workers
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import JudgedImages, by_side, collate_labels, pad_scores
from mmalign.data.loaders.image_pairs import SAME_SIDES
from mmalign.data.pairs import ImagePair, ImageRef, SkippedRow

FEATURES = "features"  # field of the cache

Preprocess = Callable[[Image], Tensor]


class JudgedExample(NamedTuple):
    """Images of a row, [K, 3, S, S] or features [K, D], their scores [K], NaN for pairs, and ratings [K, A] if read."""

    images: Tensor
    scores: Tensor
    ratings: Tensor | None


@dataclass(frozen=True)
class JudgedImageReader:
    """Reader of judged images.

    Attributes:
        preprocess: the judge's preprocessing.
        cache: the features of every good image, by its key; None reads and preprocesses the images.
    """

    preprocess: Preprocess
    cache: ArrayCache | None = None

    def read(self, pair: ImagePair, _: int) -> JudgedExample | list[SkippedRow]:
        """Return a row's images, or the reasons to skip the row.

        Raises:
            ValueError: the cache lacks a good image.
        """
        images, skipped = list[Tensor](), list[SkippedRow]()
        for ref in pair.outputs:
            try:
                images.append(self._read_image(ref))
            except BadImage as error:
                skipped.append(error.skipped)
        if not skipped and not pair.scores and torch.equal(*images):
            skipped = [SkippedRow(pair.location, SAME_SIDES, "same sides")]
        scores = torch.tensor(pair.scores or [torch.nan] * len(pair.outputs))
        ratings = torch.tensor(pair.attributes) if pair.attributes else None
        return skipped or JudgedExample(torch.stack(images), scores, ratings)

    def _read_image(self, ref: ImageRef) -> Tensor:
        if self.cache is None:
            return self.preprocess(decode(ref))
        if ref.key not in self.cache:
            decode(ref)  # only bad images may be missing from the cache
            raise ValueError(f"data.cache: {self.cache.folder} lacks {ref.location}; delete the folder")
        return self.cache.get(ref.key)[FEATURES]

    def collate(self, pairs: Sequence[ImagePair], examples: Sequence[JudgedExample], weights: Tensor) -> JudgedImages:
        """Return the batch of these rows."""
        # Ratings of the examples: a skipped row, with another's images, may have more of its own
        ratings = [example.ratings for example in examples if example.ratings is not None]
        return JudgedImages(
            [pair.row for pair in pairs],
            [pair.prompt for pair in pairs],
            torch.stack(by_side([example.images.unbind() for example in examples])),
            weights,
            pad_scores([example.scores for example in examples]),
            collate_labels(pairs),
            pad_scores(ratings) if ratings else None,
        )


def encode_features(
    images: Sequence[ImageRef], preprocess: Preprocess, encode: Callable[[Tensor], Tensor], num_workers: int
) -> Iterator[Items]:
    """Yield the features of each image by its key, or nothing for an unreadable one.

    `encode` maps preprocessed images [1, 3, S, S] to features [1, D].
    """
    for ref, pixels in zip(images, in_workers(partial(_preprocessed, preprocess), images, num_workers), strict=True):
        yield {} if pixels is None else {ref.key: {FEATURES: encode(pixels[None])[0].cpu()}}


def _preprocessed(preprocess: Preprocess, ref: ImageRef) -> Tensor | None:
    """Return a preprocessed image, or None for an unreadable one."""
    try:
        return preprocess(decode(ref))
    except BadImage:
        return None
