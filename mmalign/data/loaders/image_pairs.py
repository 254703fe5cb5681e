"""Deterministic, resumable loader of image pairs.

Batches do not depend on the number of workers or on the starting batch. B pairs per process and batch; a global batch
has B pairs for every process; R resolution. Images come chosen first, then rejected: [2B].

A pair with an unreadable image stays in its batch with weight 0, so that no other pair moves. It is counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, decode, is_flipped, prepare_pair, transform_key
from mmalign.data.loaders.sampler import EpochSampler, SkippedRows, batched
from mmalign.data.pairs import ImagePair, ImageRef, Pairs, SkippedRow, format_rows, stable_hash
from mmalign.rng import KeyedRNG

SIZES = "sizes"  # cache field with an image's micro-conditioning


@dataclass(frozen=True)
class ImageTransform:
    """Settings of the crop to squares.

    Attributes:
        resolution: R, pixels.
        crop: "center" or "random".
        flip: mirror half of the pairs.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False


@dataclass(frozen=True)
class ImagePairBatch:
    """Batch of B image pairs, not yet encoded.

    Attributes:
        rows: the pairs' ids [B].
        prompts: [B].
        rejected_prompts: the rejected images' prompts [B]; empty in a pair with one prompt.
        keys: the keys of the pairs' content [B], by `pair_key`.
        pixels: [2B, 3, R, R] in [-1, 1]; None if the images come from a cache.
        arrays: every field of the cached images, [2B, ...]; None if the images were decoded.
        sizes: [2B, 6] int64: original height and width, top and left of the crop, target height and width.
        weights: [B] float32; 0 for padding and for a pair with a bad image.
        skipped: the bad images of the batch.
    """

    rows: list[int]
    prompts: list[str]
    rejected_prompts: list[str]
    keys: list[str]
    pixels: Tensor | None
    arrays: dict[str, Tensor] | None
    sizes: Tensor
    weights: Tensor
    skipped: list[SkippedRow]


class ImagePairLoader:
    """Loader of image pairs, epoch by epoch.

    Attributes:
        skipped: the bad images met so far on this process, each once.

    Args:
        pairs: the pairs to load.
        batch_size: B, pairs per batch on this process.
        seed: the seed of the order, crops and flips.
        transform: the crop to squares.
        cache: the tensors of every good image, with a field "sizes", by `image_key`; None decodes the images.
        num_workers: number of processes that read; 0 reads in this one.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        max_bad_images: most bad images that a run may meet; None allows any number.
        keep_last: pad the last batch with pairs of weight 0 instead of dropping it, as evaluation needs.
        repeat: epochs after which a pair's crops and flips repeat; None draws new ones in every epoch.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        batch_size: int,
        seed: int,
        transform: ImageTransform,
        cache: ArrayCache | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_images: int | None = None,
        keep_last: bool = False,
        repeat: int | None = None,
    ) -> None:
        if cache is not None and transform.crop == "random":
            raise ValueError("data.cache: random crops change every epoch; use data.crop: center, or data.cache: off")
        if not len(pairs):
            raise ValueError(f"data: {pairs.source} has no pairs left to load; hold out less, or raise data.limit")
        self.pairs, self.seed, self.transform, self.cache = pairs, seed, transform, cache
        self.num_workers, self.repeat_epochs = num_workers, repeat
        self.sampler = EpochSampler(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self._skipped = SkippedRows(pairs.source, max_bad_images)
        self._keys = dict[int, str]()

    @property
    def skipped(self) -> list[SkippedRow]:
        """Bad images met so far on this process, each once."""
        return self._skipped.rows

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.sampler)

    def batches(self, epoch: int, start: int = 0) -> Iterator[ImagePairBatch]:
        """Yield the batches of an epoch from number `start`, without reading earlier ones.

        Raises:
            ValueError: more than `max_bad_images` images are bad, or every pair of the epoch is; the message names the
                first few.
        """
        if self.cache is not None and not len(self.cache):
            raise ValueError(
                f"data.cache: {self.cache.folder} has no image of {self.pairs.source}; encode the images first, and if "
                "none could be read, repair them or name another source"
            )
        good = 0
        for batch in self._read(epoch, self.sampler.plan(epoch)[start:]):
            good += int(batch.weights.sum())
            yield batch
        # With several processes, one may have only bad pairs while the others train.
        if start == 0 and not good and self.skipped and self.sampler.world_size == 1:
            raise ValueError(
                f"data.path: {self.pairs.source}: no pair of the epoch has two readable images "
                f"({format_rows(self.skipped)}); repair the images, or name another source"
            )

    def read_pairs(self, epoch: int, numbers: Sequence[int]) -> Iterator[ImagePairBatch]:
        """Yield batches of the pairs with these numbers, in this order, cropped and flipped as in that epoch."""
        return self._read(epoch, batched(numbers, self.sampler.batch_size))

    def key(self, number: int) -> str:
        """Return the key of a pair's content, by number."""
        if number not in self._keys:
            self._keys[number] = pair_key(self.pairs[number])
        return self._keys[number]

    def _read(self, epoch: int, plan: list[list[tuple[int, float]]]) -> Iterator[ImagePairBatch]:
        views = epoch % self.repeat_epochs if self.repeat_epochs else epoch
        loader = DataLoader(
            _Examples(self.pairs, self.transform, self.cache, KeyedRNG(self.seed, views)),
            batch_sampler=plan,
            collate_fn=_Collate(self.transform.resolution, self.cache),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would advance the global generator
        )
        for batch, lacking in loader:
            if lacking:
                assert self.cache is not None
                raise ValueError(
                    f"data.cache: {self.cache.folder} lacks {lacking}; encode the images again, or delete the folder"
                )
            self._skipped.add(batch.skipped)
            yield batch

    def check_readable(self) -> None:
        """Check that at least one pair is readable.

        Raises:
            ValueError: no pair is readable, or more than `max_bad_images` images are bad; the message names the first
                few.
        """
        examples = _Examples(self.pairs, self.transform, self.cache, KeyedRNG(self.seed))
        for number in range(len(self.pairs)):
            example = examples[number, 1.0]
            if example.arrays is not None or example.lacking:  # `_read` reports what the cache lacks
                return
            self._skipped.add(example.skipped)
        raise ValueError(
            f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs has two readable images "
            f"({format_rows(self.skipped)}); repair the images, or name another source"
        )

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Return the locations of a batch's pairs, for messages."""
        return [self.pairs[pair].location for pair, weight in self.sampler.plan(epoch)[number] if weight]


def pair_key(pair: ImagePair) -> str:
    """Return the cache key of a pair: its row id, its prompt or prompts, and the content of both images."""
    second = [pair.rejected_prompt] if pair.rejected_prompt else []
    return f"{pair.row:x}-{stable_hash(pair.prompt, pair.chosen.key, pair.rejected.key, *second):x}"


def image_key(ref: ImageRef, resolution: int, *, mirror: bool) -> str:
    """Return the cache key of an image: its content and its preparation."""
    return f"{ref.key}/{transform_key(resolution, mirror=mirror)}"


@dataclass(frozen=True)
class _Example:
    """Pair with its loaded images: every field (pixels too) as [2, ...], or None if an image is bad."""

    pair: ImagePair
    weight: float
    arrays: dict[str, Tensor] | None
    skipped: list[SkippedRow]
    lacking: str = ""  # a good image missing from the cache; the main process raises the error


class _Incomplete(Exception):
    pass


class _Examples(Dataset[_Example]):
    """Dataset of pairs by (number, weight), read from image files or from the cache."""

    def __init__(self, pairs: Pairs, transform: ImageTransform, cache: ArrayCache | None, rng: KeyedRNG) -> None:
        self.pairs, self.transform, self.cache, self.rng = pairs, transform, cache, rng

    def __getitem__(self, number_and_weight: tuple[int, float]) -> _Example:
        number, weight = number_and_weight
        pair = self.pairs[number]
        u = self.rng.uniform([pair.row], (3,), "view")[0]
        try:
            arrays, dropped = self._decoded(pair, u) if self.cache is None else self._cached(pair, u, self.cache)
        except _Incomplete as error:
            return _Example(pair, 0.0, None, [], lacking=str(error))
        return _Example(pair, weight if arrays is not None else 0.0, arrays, dropped)

    def _decoded(self, pair: ImagePair, u: Tensor) -> tuple[dict[str, Tensor] | None, list[SkippedRow]]:
        images, dropped = [], []
        for ref in (pair.chosen, pair.rejected):
            try:
                images.append(decode(ref))
            except BadImage as error:
                dropped.append(error.skipped)
        if dropped:
            return None, dropped
        ready = prepare_pair(
            images[0], images[1], self.transform.resolution, crop=self.transform.crop, flip=self.transform.flip, u=u
        )
        return {"pixels": ready.pixels, SIZES: ready.sizes}, []

    def _cached(
        self, pair: ImagePair, u: Tensor, cache: ArrayCache
    ) -> tuple[dict[str, Tensor] | None, list[SkippedRow]]:
        mirror = is_flipped(self.transform.flip, u)
        refs = (pair.chosen, pair.rejected)
        keys = [image_key(ref, self.transform.resolution, mirror=mirror) for ref in refs]
        absent = [ref for ref, key in zip(refs, keys, strict=True) if key not in cache]
        if not absent:
            sides = [cache.get(key) for key in keys]
            return {field: torch.stack([side[field] for side in sides]) for field in sides[0]}, []
        dropped = []
        for ref in absent:  # only bad images may be missing from the cache
            try:
                decode(ref)
            except BadImage as error:
                dropped.append(error.skipped)
            else:
                raise _Incomplete(ref.location)
        return None, dropped


class _Collate:
    """Collate function; a bad pair gets the tensors of a good one, or zeros, and weight 0."""

    def __init__(self, resolution: int, cache: ArrayCache | None) -> None:
        self.resolution, self.cache = resolution, cache

    def __call__(self, examples: list[_Example]) -> tuple[ImagePairBatch, str]:
        lacking = next((e.lacking for e in examples if e.lacking), "")
        stand_in = next((e.arrays for e in examples if e.arrays is not None), None) or self._zeros()
        filled = [e.arrays if e.arrays is not None else stand_in for e in examples]
        # Chosen images first, then rejected ones: [2B, ...]
        arrays = {
            field: torch.cat([torch.stack([a[field][side] for a in filled]) for side in (0, 1)]) for field in stand_in
        }
        sizes, pixels = arrays.pop(SIZES), arrays.pop("pixels", None)
        batch = ImagePairBatch(
            rows=[e.pair.row for e in examples],
            prompts=[e.pair.prompt for e in examples],
            rejected_prompts=[e.pair.rejected_prompt for e in examples],
            keys=[pair_key(e.pair) for e in examples],
            pixels=pixels,
            arrays=arrays if pixels is None else None,
            sizes=sizes,
            weights=torch.tensor([e.weight for e in examples]),
            skipped=[d for e in examples for d in e.skipped],
        )
        return batch, lacking

    def _zeros(self) -> dict[str, Tensor]:
        side = self.resolution
        if self.cache is None:
            return {"pixels": torch.zeros(2, 3, side, side), SIZES: torch.tensor([[side, side, 0, 0, side, side]] * 2)}
        like = self.cache.get(next(iter(self.cache)))
        return {field: torch.stack([torch.zeros_like(x)] * 2) for field, x in like.items()}
