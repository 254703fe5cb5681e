"""Deterministic order of an epoch and its batches, and the limit of bad images.

The order depends on the seed, the epoch and the number of pairs, not on workers or on the starting batch. B pairs per
process and batch; a global batch has B pairs for every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from mmalign.data.pairs import SkippedRow, format_rows
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class EpochSampler:
    """Assignment of pairs to batches.

    Attributes:
        num_pairs: number of pairs.
        batch_size: B.
        seed: the seed of the order.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        keep_last: pad the last batch with pairs of weight 0 instead of dropping it, as evaluation needs.
    """

    num_pairs: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    keep_last: bool = False

    def __len__(self) -> int:
        """Return the batches per epoch; a partial last batch counts with `keep_last`, or if it is the only one."""
        full, rest = divmod(self.num_pairs, self.batch_size * self.world_size)
        return full + 1 if rest and (self.keep_last or not full) else full

    def order(self, epoch: int) -> list[int]:
        """Return the numbers of all pairs in the order in which all processes together take them."""
        seed = int(KeyedRNG(self.seed, epoch).integers([0], 0, 2**62, "order"))
        order: list[int] = torch.randperm(self.num_pairs, generator=Generator().manual_seed(seed)).tolist()
        return order

    def plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """Return (number, weight) of each pair, for every batch of this process."""
        order = self.order(epoch)
        size = self.batch_size * self.world_size
        planned = [(number, 1.0) for number in order]
        # Pad the last batch with pairs from the start, of weight 0
        planned += [(order[i % len(order)], 0.0) for i in range(len(self) * size - len(order))]
        first = [b * size + self.rank * self.batch_size for b in range(len(self))]
        return [planned[index : index + self.batch_size] for index in first]

    def taken(self, num_batches: int, cycle: int = 1) -> list[tuple[int, int]]:
        """Return (epoch, number) of each pair in the first `num_batches` batches of every process, sorted.

        Epochs repeat after `cycle` of them. More than one cycle takes every pair.
        """
        size, pairs = self.batch_size * self.world_size, set[tuple[int, int]]()
        for epoch in range(-(-num_batches // len(self))):
            if epoch == cycle:
                return [(epoch, number) for epoch in range(cycle) for number in range(self.num_pairs)]
            left = min(len(self), num_batches - epoch * len(self))
            pairs.update((epoch, number) for number in self.order(epoch)[: left * size])
        return sorted(pairs)


def check_max_bad_images(bad: Sequence[SkippedRow], max_bad_images: int | None, source: str) -> None:
    """Check the number of bad images against the limit.

    Raises:
        ValueError: there are more than `max_bad_images`; the message names the first few.
    """
    if max_bad_images is not None and len(bad) > max_bad_images:
        raise ValueError(
            f"data.path: {source}: more than data.max_bad_images = {max_bad_images} images are bad "
            f"({format_rows(bad)}); repair them, or raise data.max_bad_images"
        )
