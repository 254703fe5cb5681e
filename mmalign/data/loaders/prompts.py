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
    """B prompts: their ids and texts, and their weights [B] float32, 0 for padding."""

    rows: list[int]
    prompts: list[str]
    weights: Tensor


class PromptLoader:
    """Batches of prompts, epoch by epoch.

    Attributes:
        skipped: what could not be used: nothing, since there is nothing to read.

    Args:
        pairs: the prompts to draw images for.
        batch_size: B, prompts of a batch on this process.
        seed: of the order.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        keep_last: fill up the last batch with prompts of weight 0 instead of leaving it out.
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
        """Batches of an epoch."""
        return len(self.sampler)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PromptBatch]:
        """The batches of an epoch from number `start` on."""
        for planned in self.sampler.plan(epoch)[start:]:
            prompts = [self.prompts[number] for number, _ in planned]
            weights = torch.tensor([weight for _, weight in planned])
            yield PromptBatch([p.row for p in prompts], [p.prompt for p in prompts], weights)

    def check_readable(self) -> None:
        """Nothing can be wrong with a text that has been read."""

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Where the prompts of a batch of an epoch stand, for people."""
        return [self.prompts[index].location for index, weight in self.sampler.plan(epoch)[number] if weight]
