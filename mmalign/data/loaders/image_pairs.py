"""The order of an epoch, and its batches: the same whatever the number of loader workers, and wherever one begins.

B pairs of a process's batch; a global batch is B pairs for every process; R resolution. Images come first chosen, then
rejected: [2B].

A pair with an unreadable image keeps its place with weight 0, so that no other pair moves; it is counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, decode, flipped, prepare_pair, view_key
from mmalign.data.loaders.sampler import Epochs, LeftOut
from mmalign.data.pairs import Dropped, ImagePair, ImageRef, Pairs, hashed, listed
from mmalign.rng import Draws

SIZES = "sizes"  # the field of a cached image's arrays that holds its micro-conditioning


@dataclass(frozen=True)
class View:
    """How images become squares.

    Attributes:
        resolution: R, pixels.
        crop: "center" or "random".
        flip: mirror half of the pairs.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False


@dataclass(frozen=True)
class PairBatch:
    """B pairs.

    Attributes:
        rows: the pairs' ids [B].
        prompts: [B].
        rejected_prompts: what the rejected images show [B]; empty in a pair with one prompt.
        keys: what the pairs' prompts and images are [B]: any other has another key.
        pixels: [2B, 3, R, R] in [-1, 1]; None where arrays come from a cache.
        arrays: every field of the cached arrays, [2B, ...]; None where images were decoded.
        sizes: [2B, 6] int64: original height and width, top and left of the crop, target height and width.
        weights: [B] float32; 0 for padding and for a pair with a bad image.
        dropped: the bad images met here.
    """

    rows: list[int]
    prompts: list[str]
    rejected_prompts: list[str]
    keys: list[str]
    pixels: Tensor | None
    arrays: dict[str, Tensor] | None
    sizes: Tensor
    weights: Tensor
    dropped: list[Dropped]


class PairLoader:
    """Batches of pairs, epoch by epoch.

    Attributes:
        dropped: the bad images met so far on this process, each once.

    Args:
        pairs: what to learn from.
        batch_size: B, pairs of a batch on this process.
        seed: of the order and of crops and flips.
        view: how images become squares.
        cache: arrays of every good image, with a field "sizes", under the keys of `images_to_encode`; None decodes.
        num_workers: processes that read; 0 reads in this one.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        max_bad: stop if more images than this are bad.
        keep_last: fill up the last batch with pairs of weight 0 instead of leaving it out, as evaluation wants.
        repeat: after so many epochs a pair's crops and flips come again; None has new ones in every epoch.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        batch_size: int,
        seed: int,
        view: View,
        cache: ArrayCache | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int | None = None,
        keep_last: bool = False,
        repeat: int | None = None,
    ) -> None:
        if cache is not None and view.crop == "random":
            raise ValueError("data.cache: random crops change every epoch; use data.crop: center, or data.cache: off")
        if not len(pairs):
            raise ValueError(f"data: {pairs.source} has no pairs left to load; hold out less, or raise data.limit")
        self.pairs, self.seed, self.view, self.cache = pairs, seed, view, cache
        self.num_workers, self.repeat = num_workers, repeat
        self.epochs = Epochs(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self._bad = LeftOut(pairs.source, max_bad)
        self._keys = dict[int, str]()

    @property
    def dropped(self) -> list[Dropped]:
        """The bad images met so far on this process, each once."""
        return self._bad.all

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.epochs)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from number `start` on; those before it are not read.

        Raises:
            ValueError: more than `max_bad` images are bad, or all pairs of the epoch are; it names the first few.
        """
        if self.cache is not None and not len(self.cache):
            raise ValueError(
                f"data.cache: {self.cache.folder} has no image of {self.pairs.source}; encode the images first, and if "
                "none could be read, repair them or name another source"
            )
        good = 0
        for batch in self._read(epoch, self.epochs.plan(epoch)[start:]):
            good += int(batch.weights.sum())
            yield batch
        # Of several processes, one may have drawn only bad pairs while the others learn.
        if start == 0 and not good and self.dropped and self.epochs.world_size == 1:
            raise ValueError(
                f"data.path: {self.pairs.source}: no pair of the epoch has two readable images "
                f"({listed(self.dropped)}); repair the images, or name another source"
            )

    def pick(self, epoch: int, numbers: Sequence[int]) -> Iterator[PairBatch]:
        """Some of the batches of an epoch, by number."""
        plan = self.epochs.plan(epoch)
        return self._read(epoch, [plan[number] for number in numbers])

    def key(self, number: int) -> str:
        """The key of a pair, by number; see PairBatch."""
        if number not in self._keys:
            self._keys[number] = pair_key(self.pairs[number])
        return self._keys[number]

    def singles(self, epoch: int, numbers: Sequence[int]) -> Iterator[PairBatch]:
        """Pairs by number, in this order, each in a batch of its own; cropped and flipped as in that epoch."""
        return self._read(epoch, [[(number, 1.0)] for number in numbers])

    def _read(self, epoch: int, plan: list[list[tuple[int, float]]]) -> Iterator[PairBatch]:
        views = epoch % self.repeat if self.repeat else epoch
        loader = DataLoader(
            _Examples(self.pairs, self.view, self.cache, Draws(self.seed, views)),
            batch_sampler=plan,
            collate_fn=_Collate(self.view.resolution, self.cache),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would draw from, and move, the global one
        )
        for batch, lacking in loader:
            if lacking:
                assert self.cache is not None
                raise ValueError(
                    f"data.cache: {self.cache.folder} lacks {lacking}; encode the images again, or delete the folder"
                )
            self._bad.add(batch.dropped)
            yield batch

    def check_readable(self) -> None:
        """Read pairs until one is good.

        Raises:
            ValueError: none is, or more than `max_bad` images are bad; it names the first few.
        """
        examples = _Examples(self.pairs, self.view, self.cache, Draws(self.seed))
        for number in range(len(self.pairs)):
            example = examples[number, 1.0]
            if example.arrays is not None or example.lacking:  # what lacks is told of when it is needed
                return
            self._bad.add(example.dropped)
        raise ValueError(
            f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs has two readable images "
            f"({listed(self.dropped)}); repair the images, or name another source"
        )

    def places(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a batch of an epoch lie, for people."""
        return [self.pairs[pair].where for pair, weight in self.epochs.plan(epoch)[number] if weight]


def pair_key(pair: ImagePair) -> str:
    """The key of what is made of a pair: its draws, its prompt or prompts, and the content of both images."""
    second = [pair.rejected_prompt] if pair.rejected_prompt else []
    return f"{pair.row:x}-{hashed(pair.prompt, pair.chosen.key, pair.rejected.key, *second):x}"


def image_key(ref: ImageRef, resolution: int, *, mirror: bool) -> str:
    """The key of an image's arrays in a cache: its content and how it was prepared."""
    return f"{ref.key}/{view_key(resolution, mirror=mirror)}"


@dataclass(frozen=True)
class _Example:
    """One pair as read: `arrays` [2, ...] of every field (pixels among them), None if an image is bad."""

    pair: ImagePair
    weight: float
    arrays: dict[str, Tensor] | None
    dropped: list[Dropped]
    lacking: str = ""  # the good image that is not in the cache: an error, raised by the main process in one line


class _Incomplete(Exception):
    pass


class _Examples(Dataset[_Example]):
    """Pairs by (number, weight), read from their images or from the cache."""

    def __init__(self, pairs: Pairs, view: View, cache: ArrayCache | None, draws: Draws) -> None:
        self.pairs, self.view, self.cache, self.draws = pairs, view, cache, draws

    def __getitem__(self, at: tuple[int, float]) -> _Example:
        number, weight = at
        pair = self.pairs[number]
        u = self.draws.uniform([pair.row], (3,), "view")[0]
        try:
            arrays, dropped = self._decoded(pair, u) if self.cache is None else self._cached(pair, u, self.cache)
        except _Incomplete as error:
            return _Example(pair, 0.0, None, [], lacking=str(error))
        return _Example(pair, weight if arrays is not None else 0.0, arrays, dropped)

    def _decoded(self, pair: ImagePair, u: Tensor) -> tuple[dict[str, Tensor] | None, list[Dropped]]:
        images, dropped = [], []
        for ref in (pair.chosen, pair.rejected):
            try:
                images.append(decode(ref))
            except BadImage as error:
                dropped.append(_dropped(ref, error))
        if dropped:
            return None, dropped
        ready = prepare_pair(images[0], images[1], self.view.resolution, crop=self.view.crop, flip=self.view.flip, u=u)
        return {"pixels": ready.pixels, SIZES: ready.sizes}, []

    def _cached(self, pair: ImagePair, u: Tensor, cache: ArrayCache) -> tuple[dict[str, Tensor] | None, list[Dropped]]:
        mirror = flipped(self.view.flip, u)
        refs = (pair.chosen, pair.rejected)
        keys = [image_key(ref, self.view.resolution, mirror=mirror) for ref in refs]
        absent = [ref for ref, key in zip(refs, keys, strict=True) if key not in cache]
        if not absent:
            sides = [cache.get(key) for key in keys]
            return {field: torch.stack([side[field] for side in sides]) for field in sides[0]}, []
        dropped = []
        for ref in absent:  # only a bad image may be absent
            try:
                decode(ref)
            except BadImage as error:
                dropped.append(_dropped(ref, error))
            else:
                raise _Incomplete(ref.where)
        return None, dropped


class _Collate:
    """Examples to a batch; a bad pair gets the arrays of a good one, or zeros, and weight 0."""

    def __init__(self, resolution: int, cache: ArrayCache | None) -> None:
        self.resolution, self.cache = resolution, cache

    def __call__(self, examples: list[_Example]) -> tuple[PairBatch, str]:
        lacking = next((e.lacking for e in examples if e.lacking), "")
        stand_in = next((e.arrays for e in examples if e.arrays is not None), None) or self._zeros()
        filled = [e.arrays if e.arrays is not None else stand_in for e in examples]
        arrays = {
            field: torch.cat([torch.stack([a[field][side] for a in filled]) for side in (0, 1)]) for field in stand_in
        }
        sizes, pixels = arrays.pop(SIZES), arrays.pop("pixels", None)
        batch = PairBatch(
            rows=[e.pair.row for e in examples],
            prompts=[e.pair.prompt for e in examples],
            rejected_prompts=[e.pair.rejected_prompt for e in examples],
            keys=[pair_key(e.pair) for e in examples],
            pixels=pixels,
            arrays=arrays if pixels is None else None,
            sizes=sizes,
            weights=torch.tensor([e.weight for e in examples]),
            dropped=[d for e in examples for d in e.dropped],
        )
        return batch, lacking

    def _zeros(self) -> dict[str, Tensor]:
        side = self.resolution
        if self.cache is None:
            return {"pixels": torch.zeros(2, 3, side, side), SIZES: torch.tensor([[side, side, 0, 0, side, side]] * 2)}
        like = self.cache.get(next(iter(self.cache)))
        return {field: torch.stack([torch.zeros_like(x)] * 2) for field, x in like.items()}


def _dropped(ref: ImageRef, error: BadImage) -> Dropped:
    return Dropped(ref.where, str(error).removeprefix(f"{ref.where}: "))
