"""Reading of judged images for a judge in training: preprocessed, or as features that are computed once.

B rows per batch of at most K images: [KB], the first image of every row, then the second ones. A row with fewer images
repeats its first one. S is the side of the judge's input image, D the width of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.fill import Items
from mmalign.data.images import BadImage, decode
from mmalign.data.loaders.batches import JudgedImages, collate_labels, pad_scores
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
        # First the first image of every row, then the second; a row with fewer images repeats its first
        scores = pad_scores([example.scores for example in examples])
        sides = [
            torch.stack([x.images[side if side < len(x.images) else 0] for x in examples])
            for side in range(scores.shape[1])
        ]
        rows, prompts = [pair.row for pair in pairs], [pair.prompt for pair in pairs]
        # Those of the examples: a skipped row, with another's images, may have more of its own
        ratings = [example.ratings for example in examples if example.ratings is not None]
        rated = pad_scores(ratings) if ratings else None
        return JudgedImages(rows, prompts, torch.cat(sides), weights, scores, collate_labels(pairs), rated)


def encode_features(
    images: Sequence[ImageRef], preprocess: Preprocess, encode: Callable[[Tensor], Tensor], num_workers: int
) -> Iterator[Items]:
    """Yield the features of each image by its key, or nothing for an unreadable one.

    Args:
        images: the images.
        preprocess: the judge's preprocessing.
        encode: a function from preprocessed images [1, 3, S, S] to features [1, D].
        num_workers: number of processes that read; 0 reads in this one.
    """
    loader: Iterable[Tensor | None] = DataLoader(
        _Preprocessed(images, preprocess),
        batch_size=None,
        num_workers=num_workers,
        generator=Generator().manual_seed(0),
    )
    for ref, pixels in zip(images, loader, strict=True):
        yield {} if pixels is None else {ref.key: {FEATURES: encode(pixels[None])[0].cpu()}}


class _Preprocessed(Dataset[Tensor | None]):
    """Dataset of preprocessed images; None stands for an unreadable one."""

    def __init__(self, images: Sequence[ImageRef], preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor | None:
        try:
            return self.preprocess(decode(self.images[number]))
        except BadImage:
            return None
