"""Precomputed per-pair tensors (reference scores, inverted latents), cached on disk before training.

A method declares them with a PrecomputeSpec. There are two kinds, filled in two ways.

Tensors that a method computes with (such as INPO's) are filled pair by pair, independently of the batch size.

Reference scores are computed in the batch that first contains a pair (the first-batch rule):

* A network's rounding depends on its batch. The loss of an untrained policy is exactly ln 2 only if its reference was
  scored in the same batch.
* So training with cached scores equals training without them, bit for bit, in the first epoch (with K draws, in the
  first K epochs).
* Later epochs batch a pair with others. There the reference itself would round differently, in float32 by some 1e-6
  of a score.
* Scoring pairs alone would cause that error from the first update. Scoring every epoch's batches would cost as much
  as running the reference.
* The batches depend on the seed, the batch size, and the numbers of pairs and processes. These are therefore part of
  the cache's fingerprint.

An interruption loses at most the shard that was not yet written.
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

SHARD = 128  # pairs per file


Compute = Callable[..., dict[str, Tensor]]
Loader = ImagePairLoader | ResponsePairLoader


Batch = ImagePairBatch | ResponsePairBatch


RequiredKeys = dict[str, tuple[int, int]]  # key -> (epoch, pair's number)


ComputeFn = Callable[[Any, int], dict[str, Tensor]]  # (batch, epoch) -> tensors by name, each [B, ...]


@dataclass(frozen=True)
class PrecomputeSpec:
    """Declaration of a method's tensors that are computed once per pair and draw.

    Attributes:
        num_draws: epochs after which a pair's draws repeat; 1 if there are none.
        settings: hyper-parameters that the tensors depend on.
        scores: the tensors replace the reference and are computed in the training batches.
        compute: maps (policy, batch, config, rng) to a batch's tensors by name, each [B, ...]; None uses the reference
            scores of the method's one contrast.
    """

    num_draws: int
    settings: Mapping[str, str | int | float]
    scores: bool = False
    compute: Compute | None = None

    @property
    def folder(self) -> str:
        """Name of the cache's folder among a recipe's caches."""
        return "reference" if self.scores else "kept"


@dataclass(frozen=True)
class PrecomputeCache:
    """Cache of a method's precomputed tensors by pair and draw.

    Attributes:
        cache: the cache on disk.
        spec: the declaration of the tensors.
        required: a missing tensor is an error, because no loaded model can compute it.
        unusable_keys: the keys of unusable pairs that this process has met.
    """

    cache: ArrayCache
    spec: PrecomputeSpec
    required: bool = False
    unusable_keys: set[str] = field(default_factory=set)

    def key(self, pair: str, epoch: int) -> str:
        """Return the key of a pair's tensors in an epoch."""
        return f"{pair}/{epoch % self.spec.num_draws}"

    def lookup(self, batch: Batch, epoch: int, device: torch.device) -> dict[str, Tensor] | None:
        """Return the cached tensors of a batch by name, each [B, ...]; None if a pair with nonzero weight has none.

        Uncached pairs of weight 0 get zeros. Tensors of unequal length are zero-padded at the end.

        Raises:
            ValueError: a tensor is missing and `required` is set.
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
        # Zeros for uncached padding, shaped like any cached row
        rows = [self.cache.get(key) if found else None for key, found in zip(keys, is_cached, strict=True)]
        like = next((row for row in rows if row is not None), None) or self.cache.get(next(iter(self.cache)))
        zeros = {name: torch.zeros_like(x) for name, x in like.items()}
        return {name: _stacked([(row or zeros)[name] for row in rows]).to(device) for name in like}

    def fill(
        self, loader: Loader, batches: int, compute: ComputeFn, *, rank: int, world_size: int, shared: bool = True
    ) -> Iterator[int]:
        """Fill this process's share of the missing tensors; yield their number first, then 1 for each.

        Reference scores are counted by batch, other tensors by pair.

        Args:
            loader: the loader of the training batches.
            batches: number of training batches on every process.
            compute: computes a batch's tensors.
            rank: index of this process.
            world_size: number of processes.
            shared: the processes share the loader's epochs; if False, every process meets all of its batches.
        """
        if self.spec.scores:
            return self._fill_batches(loader, batches, compute, 0 if shared else rank, 1 if shared else world_size)
        assert isinstance(loader, ImagePairLoader)
        return self._fill_per_pair(loader, batches, compute, rank, world_size)

    def required_keys(self, loader: Loader, batches: int) -> RequiredKeys:
        """Return the keys that the first `batches` batches of every process need, each once."""
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
                if batch.weights[0]:  # a pair with a bad image has no tensors
                    shard.add(key, compute(batch, epoch), 0)
                yield 1
        shard.close()

    def _fill_batches(
        self, loader: Loader, batches: int, compute: ComputeFn, rank: int, world_size: int
    ) -> Iterator[int]:
        """Fill reference scores, computing every pair in the batch that meets it first.

        A batch goes to the process with rank `number % world_size`. Positions among the missing batches would not do:
        another process may have stored some already.
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
                if lacking:  # empty if the only missing pair of the batch is bad
                    arrays = compute(batch, epoch)
                    for row in lacking:
                        shard.add(keys[row], arrays, row)
                yield 1
            self.unusable_keys.update(self._failed_keys(loader, epoch, numbers, shard))
        shard.close()

    def _missing_batches(self, loader: Loader, batches: int) -> dict[int, list[int]]:
        """Return, by epoch, the numbers of this process's batches that first meet an uncached pair."""
        seen, missing = {*self.cache, *self.unusable_keys}, dict[int, list[int]]()
        for epoch, numbers in pairs_by_epoch(loader, batches):
            left = min(len(loader), batches - epoch * len(loader))
            missing[epoch] = [
                index
                for index, batch in enumerate(loader.sampler.plan(epoch)[:left])
                if any(weight and self.key(loader.key(number), epoch) not in seen for number, weight in batch)
            ]
            seen.update(self.key(loader.key(number), epoch) for number in numbers)  # by any process
        return missing

    def _failed_keys(self, loader: Loader, epoch: int, numbers: Sequence[int], shard: _ShardWriter) -> Iterator[str]:
        """Yield the keys of pairs in these batches that have no tensors after filling."""
        plan = loader.sampler.plan(epoch)
        for pair, weight in (one for number in numbers for one in plan[number]):
            key = self.key(loader.key(pair), epoch)
            if weight and not shard.has(key):
                yield key

    def count_empty_batches(self, loader: Loader, batches: int) -> int:
        """Count this process's batches, among the first `batches`, without a usable pair; call it after filling."""
        found = 0
        for epoch, _ in pairs_by_epoch(loader, batches):
            left = min(len(loader), batches - epoch * len(loader))
            for batch in loader.sampler.plan(epoch)[:left]:
                keys = (self.key(loader.key(number), epoch) for number, weight in batch if weight)
                found += all(key not in self.cache for key in keys)
        return found


class _ShardWriter:
    """Buffer that collects rows of tensors and writes them to a cache in shards."""

    def __init__(self, cache: ArrayCache) -> None:
        self.cache, self.stored = cache, dict[str, dict[str, Tensor]]()

    def has(self, key: str) -> bool:
        """Check whether a key is cached or buffered."""
        return key in self.cache or key in self.stored

    def add(self, key: str, arrays: dict[str, Tensor], row: int) -> None:
        """Buffer one row of some tensors unless its key is already there; write a full shard."""
        if self.has(key):
            return
        self.stored[key] = {name: x[row].cpu().clone() for name, x in arrays.items()}
        if len(self.stored) == SHARD:
            self.close()

    def close(self) -> None:
        """Write the buffered rows."""
        self.cache.put(self.stored)
        self.stored = {}


def pairs_by_epoch(loader: Any, batches: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (epoch, pair numbers) of the first `batches` batches of every process."""
    size = loader.sampler.batch_size * loader.sampler.world_size
    for epoch in range(-(-batches // len(loader))):
        left = min(len(loader), batches - epoch * len(loader))
        yield epoch, loader.sampler.order(epoch)[: left * size]


def _stacked(rows: Iterable[Tensor]) -> Tensor:
    """Return the tensors stacked to [B, ...], zero-padded at the end if their lengths differ."""
    tensors = list(rows)
    if len({x.shape for x in tensors}) == 1:
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
