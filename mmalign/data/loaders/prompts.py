"""Deterministic loader of prompts, for methods that generate their own images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.data.formats.prompts import PromptRow
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.data.pairs import Pairs, SkippedRow


@dataclass(frozen=True)
class PromptBatch:
    """Batch of B prompts: their ids, their texts, and weights [B] float32, 0 for padding."""

    rows: list[int]
    prompts: list[str]
    weights: Tensor


class PromptLoader:
    """Loader of prompts, epoch by epoch.

    Attributes:
        skipped: the unusable prompts; always empty.

    Args:
        pairs: the prompts to generate images for.
        batch_size: B, prompts per batch on this process.
        seed: the seed of the order.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        keep_last: pad the last batch with prompts of weight 0 instead of dropping it.
    """

    def __init__(
        self,
        pairs: Pairs[PromptRow],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        keep_last: bool = False,
    ) -> None:
        self.prompts = pairs
        self.sampler = EpochSampler(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self.skipped: list[SkippedRow] = []

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.sampler)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PromptBatch]:
        """Yield the batches of an epoch from number `start`."""
        for planned in self.sampler.plan(epoch)[start:]:
            prompts = [self.prompts[number] for number, _ in planned]
            weights = torch.tensor([weight for _, weight in planned])
            yield PromptBatch([p.row for p in prompts], [p.prompt for p in prompts], weights)

    def check_readable(self) -> None:
        """Do nothing: prompts are already in memory."""

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Return the locations of a batch's prompts, for messages."""
        return [self.prompts[index].location for index, weight in self.sampler.plan(epoch)[number] if weight]
