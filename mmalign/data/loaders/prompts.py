"""Deterministic loader of prompts, for methods that generate their own images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.data.formats.prompts import Prompt
from mmalign.data.loaders.sampler import Epochs
from mmalign.data.pairs import Dropped, Pairs


@dataclass(frozen=True)
class PromptBatch:
    """B prompts: their ids and texts, and their weights [B] float32, 0 for padding."""

    rows: list[int]
    prompts: list[str]
    weights: Tensor


class PromptLoader:
    """Batches of prompts, epoch by epoch.

    Attributes:
        dropped: what could not be used: nothing, since there is nothing to read.

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
        pairs: Pairs[Prompt],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        keep_last: bool = False,
    ) -> None:
        self.prompts = pairs
        self.epochs = Epochs(len(pairs), batch_size, seed, rank, world_size, keep_last)
        self.dropped: list[Dropped] = []

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.epochs)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PromptBatch]:
        """The batches of an epoch from number `start` on."""
        for planned in self.epochs.plan(epoch)[start:]:
            found = [self.prompts[number] for number, _ in planned]
            weights = torch.tensor([weight for _, weight in planned])
            yield PromptBatch([p.row for p in found], [p.prompt for p in found], weights)

    def check_readable(self) -> None:
        """Nothing can be wrong with a text that has been read."""

    def places(self, epoch: int, number: int) -> list[str]:
        """Where the prompts of a batch of an epoch stand, for people."""
        return [self.prompts[at].where for at, weight in self.epochs.plan(epoch)[number] if weight]
