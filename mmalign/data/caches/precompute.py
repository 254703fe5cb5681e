"""What a method works out for every pair beforehand, on disk: filled before the training, found in every batch.

mmalign.methods says what a method must offer for it. Two kinds are filled in two ways.

What a method computes with is worked out pair by pair: the numbers depend on nobody's batch size.

The reference's scores are worked out in the batches in which the training first meets the pairs. A network rounds by
the batch that it is given, and a policy that has not moved has a loss of exactly ln 2 only if its reference was given
the same one. So in the first epoch (with K draws, in the first K) training from kept scores is training without, bit
for bit; after it a pair comes in other company, where the reference itself would round otherwise, in float32 by some
1e-6 of a score. Worked out alone they would be off by as much from the first update on; worked out in every epoch's
own batches they would cost what running the reference costs. The batches depend on seed, size, number of pairs and
processes, so these belong to what a cache of scores is of.

A stop costs at most what was not written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.loaders.image_pairs import ImagePairBatch, ImagePairLoader
from mmalign.data.loaders.response_pairs import ResponsePairBatch, ResponsePairLoader

SHARD = 128  # pairs of a file


Compute = Callable[..., dict[str, Tensor]]
Loader = ImagePairLoader | ResponsePairLoader


Batch = ImagePairBatch | ResponsePairBatch


RequiredKeys = dict[str, tuple[int, int]]  # key -> the epoch that it is of, the pair's number


ComputeFn = Callable[[Any, int], dict[str, Tensor]]  # of a batch of an epoch, by name, each [B, ...]


@dataclass(frozen=True)
class PrecomputeSpec:
    """Tensors of a method that are computed once per pair and draw.

    Attributes:
        num_draws: epochs after which a pair's draws repeat; 1 if there are none.
        settings: hyper-parameters that the tensors depend on.
        scores: the tensors are all that is needed of the reference, computed in the training's own batches.
        compute: makes the tensors of a batch from (policy, batch, config, rng), by name, each [B, ...]; None takes the
            reference scores of the method's one contrast.
    """

    num_draws: int
    settings: Mapping[str, str | int | float]
    scores: bool = False
    compute: Compute | None = None

    @property
    def folder(self) -> str:
        """The folder of the cache, among a recipe's caches."""
        return "reference" if self.scores else "kept"


@dataclass(frozen=True)
class PrecomputeCache:
    """A cache of a method's arrays by pair and draw.

    Attributes:
        cache: where they are.
        spec: what they are.
        required: nothing else can give them: what is missing is an error.
        unusable_keys: the keys of pairs that were met here and cannot be used.
    """

    cache: ArrayCache
    spec: PrecomputeSpec
    required: bool = False
    unusable_keys: set[str] = field(default_factory=set)

    def key(self, pair: str, epoch: int) -> str:
        """Of a pair's arrays in an epoch."""
        return f"{pair}/{epoch % self.spec.num_draws}"

    def lookup(self, batch: Batch, epoch: int, device: torch.device) -> dict[str, Tensor] | None:
        """The arrays of a batch, each [B, ...], or None where a pair that counts has none. Others get zeros.

        Arrays of unequal length are filled up with zeros at their end.

        Raises:
            ValueError: there is no other way to come by an array that is missing.
        """
        keys = [self.key(pair, epoch) for pair in batch.keys]
        is_cached = [key in self.cache for key in keys]
        if any(weight and not found for weight, found in zip(batch.weights, is_cached, strict=True)) or not len(
            self.cache
        ):
            if self.required:
                raise ValueError(
                    f"data.cache: {self.cache.folder} lacks what the reference scores in a batch of epoch {epoch}, and "
                    "nothing else in memory can give it; run the same command again, and if that does not help, use "
                    "data.cache: off"
                )
            return None
        rows = [self.cache.get(key) if found else None for key, found in zip(keys, is_cached, strict=True)]
        like = next((row for row in rows if row is not None), None) or self.cache.get(next(iter(self.cache)))
        zeros = {name: torch.zeros_like(x) for name, x in like.items()}
        return {name: _stacked([(row or zeros)[name] for row in rows]).to(device) for name in like}

    def fill(
        self, loader: Loader, batches: int, compute: ComputeFn, *, rank: int, world_size: int, shared: bool = True
    ) -> Iterator[int]:
        """Work out this process's share of what the cache lacks; yields how many there are first, then 1 for each.

        Args:
            loader: of the pairs, and of the batches that the training will meet.
            batches: how many of them, on every process.
            compute: gives a batch's arrays.
            rank: this process among `world_size`.
            world_size: how many processes work.
            shared: the processes share the loader's epochs; otherwise each is to meet all of its batches.
        """
        if self.spec.scores:
            return self._fill_batches(loader, batches, compute, 0 if shared else rank, 1 if shared else world_size)
        assert isinstance(loader, ImagePairLoader)
        return self._fill_per_pair(loader, batches, compute, rank, world_size)

    def required_keys(self, loader: Loader, batches: int) -> RequiredKeys:
        """What the first `batches` batches of every process will ask for, each once."""
        required = RequiredKeys()
        for epoch, numbers in pairs_by_epoch(loader, batches):
            for number in numbers:
                required.setdefault(self.key(loader.key(number), epoch), (epoch % self.spec.num_draws, number))
        return required

    def _fill_per_pair(
        self, loader: ImagePairLoader, batches: int, compute: ComputeFn, rank: int, world_size: int
    ) -> Iterator[int]:
        required = self.required_keys(loader, batches)
        mine = self.cache.share(required, rank=rank, world_size=world_size)
        yield len(mine)
        shard = _ShardWriter(self.cache)
        for epoch in sorted({required[key][0] for key in mine}):
            keys = [key for key in mine if required[key][0] == epoch]
            read = loader.single_pairs(epoch, [required[key][1] for key in keys])
            for key, batch in zip(keys, read, strict=True):
                if batch.weights[0]:  # a bad image has nothing to work out
                    shard.add(key, compute(batch, epoch), 0)
                yield 1
        shard.close()

    def _fill_batches(
        self, loader: Loader, batches: int, compute: ComputeFn, rank: int, world_size: int
    ) -> Iterator[int]:
        """Every pair in the batch that meets it first; of these, the batches whose number falls to this process.

        By their number and not by their place among what is lacking: another process may have stored some already.
        """
        missing = self._missing_batches(loader, batches).items()
        dealt = {epoch: [index for index in numbers if index % world_size == rank] for epoch, numbers in missing}
        planned = {epoch: numbers for epoch, numbers in dealt.items() if numbers}
        yield sum(map(len, planned.values()))
        shard = _ShardWriter(self.cache)
        for epoch, numbers in planned.items():
            for batch in loader.select_batches(epoch, numbers):
                keys = [self.key(pair, epoch) for pair in batch.keys]
                lacking = [row for row, key in enumerate(keys) if batch.weights[row] and not shard.has(key)]
                if lacking:  # of a batch that was planned for a bad pair alone, nothing
                    arrays = compute(batch, epoch)
                    for row in lacking:
                        shard.add(keys[row], arrays, row)
                yield 1
            self.unusable_keys.update(self._failed_keys(loader, epoch, numbers, shard))
        shard.close()

    def _missing_batches(self, loader: Loader, batches: int) -> dict[int, list[int]]:
        """For every epoch the numbers of this process's batches that are the first to meet a pair not kept."""
        seen, missing = {*self.cache, *self.unusable_keys}, dict[int, list[int]]()
        for epoch, numbers in pairs_by_epoch(loader, batches):
            left = min(len(loader), batches - epoch * len(loader))
            missing[epoch] = [
                index
                for index, batch in enumerate(loader.sampler.plan(epoch)[:left])
                if any(weight and self.key(loader.key(number), epoch) not in seen for number, weight in batch)
            ]
            seen.update(self.key(loader.key(number), epoch) for number in numbers)  # by this process or by another
        return missing

    def _failed_keys(self, loader: Loader, epoch: int, numbers: Sequence[int], shard: _ShardWriter) -> Iterator[str]:
        """The keys of pairs of these batches for which nothing was worked out."""
        plan = loader.sampler.plan(epoch)
        for pair, weight in (one for number in numbers for one in plan[number]):
            key = self.key(loader.key(pair), epoch)
            if weight and not shard.has(key):
                yield key

    def count_empty_batches(self, loader: Loader, batches: int) -> int:
        """How many of this process's first `batches` batches have no pair that can be used, all having been filled."""
        found = 0
        for epoch, _ in pairs_by_epoch(loader, batches):
            left = min(len(loader), batches - epoch * len(loader))
            for batch in loader.sampler.plan(epoch)[:left]:
                keys = (self.key(loader.key(number), epoch) for number, weight in batch if weight)
                found += all(key not in self.cache for key in keys)
        return found


class _ShardWriter:
    """Arrays on their way to a file of a cache."""

    def __init__(self, cache: ArrayCache) -> None:
        self.cache, self.stored = cache, dict[str, dict[str, Tensor]]()

    def has(self, key: str) -> bool:
        """Whether there is something of this key, written or not."""
        return key in self.cache or key in self.stored

    def add(self, key: str, arrays: dict[str, Tensor], row: int) -> None:
        """Take one row of some arrays, if there is none of its key yet."""
        if self.has(key):
            return
        self.stored[key] = {name: x[row].cpu().clone() for name, x in arrays.items()}
        if len(self.stored) == SHARD:
            self.close()

    def close(self) -> None:
        """Write what there is."""
        self.cache.put(self.stored)
        self.stored = {}


def pairs_by_epoch(loader: Any, batches: int) -> Iterator[tuple[int, list[int]]]:
    """Every epoch that the first `batches` batches of every process are of, with the numbers of the pairs in them."""
    size = loader.sampler.batch_size * loader.sampler.world_size
    for epoch in range(-(-batches // len(loader))):
        left = min(len(loader), batches - epoch * len(loader))
        yield epoch, loader.sampler.order(epoch)[: left * size]


def _stacked(rows: Iterable[Tensor]) -> Tensor:
    """Arrays in one, [B, ...]."""
    tensors = list(rows)
    if len({x.shape for x in tensors}) == 1:
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
