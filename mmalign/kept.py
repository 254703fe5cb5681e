"""What a method works out for every pair beforehand, on disk: filled before the training, found in every batch.

mmalign.methods says what a method must offer for it. A pair is worked out alone, so the numbers depend on nobody's
batch size, and a stop costs at most what was not written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmalign.data.cache import ArrayCache
from mmalign.data.loader import PairBatch, PairLoader, pair_key
from mmalign.data.pairs import hashed
from mmalign.methods import Keep

SHARD = 128  # pairs of a file

Wanted = dict[str, tuple[int, int]]  # key -> the epoch that it is of, the pair's number


@dataclass(frozen=True)
class Kept:
    """A cache of a method's arrays by pair and draw."""

    cache: ArrayCache
    keep: Keep

    def key(self, pair: str, epoch: int) -> str:
        """Of a pair's arrays in an epoch."""
        return f"{pair}/{epoch % self.keep.draws}"

    def find(self, batch: PairBatch, epoch: int, device: torch.device) -> dict[str, Tensor] | None:
        """The arrays of a batch, each [B, ...], or None where a pair that counts has none. Others get zeros."""
        keys = [self.key(pair, epoch) for pair in batch.keys]
        there = [key in self.cache for key in keys]
        if not any(there) or any(weight and not found for weight, found in zip(batch.weights, there, strict=True)):
            return None
        rows = [self.cache.get(key) if found else None for key, found in zip(keys, there, strict=True)]
        like = next(row for row in rows if row is not None)
        zeros = {name: torch.zeros_like(x) for name, x in like.items()}
        return {name: torch.stack([(row or zeros)[name] for row in rows]).to(device) for name in like}

    def wanted(self, loader: PairLoader, batches: int) -> Wanted:
        """What the first `batches` batches of every process will ask for, each once."""
        pairs, found = loader.pairs, Wanted()
        names = dict[int, str]()
        size = loader.epochs.batch_size * loader.epochs.world_size
        for epoch in range(-(-batches // len(loader))):
            left = min(len(loader), batches - epoch * len(loader))
            for number in loader.epochs.order(epoch)[: left * size]:
                names[number] = names.get(number) or pair_key(pairs[number])
                found.setdefault(self.key(names[number], epoch), (epoch % self.keep.draws, number))
        return found

    def fill(
        self,
        loader: PairLoader,
        batches: int,
        work_out: Callable[[PairBatch, int], dict[str, Tensor]],
        *,
        rank: int,
        world_size: int,
    ) -> Iterator[int]:
        """Work out this process's share of what the cache lacks; yields how many there are first, then 1 for each."""
        wanted = self.wanted(loader, batches)
        mine = [key for key in self.cache.missing(wanted) if hashed(key) % world_size == rank]
        yield len(mine)
        stored: dict[str, dict[str, Tensor]] = {}
        for epoch in sorted({wanted[key][0] for key in mine}):
            keys = [key for key in mine if wanted[key][0] == epoch]
            read = loader.singles(epoch, [wanted[key][1] for key in keys])
            for key, batch in zip(keys, read, strict=True):
                if batch.weights[0]:  # a bad image has nothing to work out
                    stored[key] = {name: x[0].cpu() for name, x in work_out(batch, epoch).items()}
                if len(stored) == SHARD:
                    self.cache.put(stored)
                    stored = {}
                yield 1
        self.cache.put(stored)


def asked(method: Any, config: Any, **made_by: str) -> Keep | None:
    """What a method would like to have kept, with all that it depends on besides the pairs; None if nothing."""
    keep: Keep | None = method.keeps(config) if hasattr(method, "keeps") else None
    name: str = method.__name__.rpartition(".")[2]
    return keep and replace(keep, settings={**keep.settings, "method": name, **made_by})
