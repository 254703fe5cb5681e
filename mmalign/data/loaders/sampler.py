"""The order of an epoch and its batches, whatever they hold: the same wherever one begins, with any workers.

B pairs of a process's batch; a global batch is B pairs for every process.
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
    """Which pairs are in which batch.

    Attributes:
        num_pairs: how many pairs there are.
        batch_size: B.
        seed: of the order.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        keep_last: fill up the last batch with pairs of weight 0 instead of leaving it out, as evaluation wants.
    """

    num_pairs: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    keep_last: bool = False

    def __len__(self) -> int:
        """Batches of an epoch: the last is left out if it is not full, unless `keep_last` or it is the only one."""
        full, rest = divmod(self.num_pairs, self.batch_size * self.world_size)
        return full + 1 if rest and (self.keep_last or not full) else full

    def order(self, epoch: int) -> list[int]:
        """The numbers of all pairs, in the order in which all processes together take them."""
        seed = int(KeyedRNG(self.seed, epoch).integers([0], 0, 2**62, "order"))
        order: list[int] = torch.randperm(self.num_pairs, generator=Generator().manual_seed(seed)).tolist()
        return order

    def plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """For every batch of this process, the numbers and weights of its pairs."""
        order = self.order(epoch)
        size = self.batch_size * self.world_size
        planned = [(number, 1.0) for number in order]
        planned += [(order[i % len(order)], 0.0) for i in range(len(self) * size - len(order))]
        first = [b * size + self.rank * self.batch_size for b in range(len(self))]
        return [planned[index : index + self.batch_size] for index in first]


class SkippedRows:
    """What could not be used so far on this process, each once.

    Args:
        source: where it lies, for people.
        max_bad_images: stop if there is more than this; None never stops.
    """

    def __init__(self, source: str, max_bad_images: int | None) -> None:
        self.source, self.max_bad_images = source, max_bad_images
        self._rows: dict[str, SkippedRow] = {}

    @property
    def rows(self) -> list[SkippedRow]:
        """In the order in which they were met."""
        return list(self._rows.values())

    def add(self, dropped: Sequence[SkippedRow]) -> None:
        """Take in more.

        Raises:
            ValueError: there are too many now.
        """
        self._rows.update((d.location, d) for d in dropped)
        check_max_bad_images(self.rows, self.max_bad_images, self.source)


def check_max_bad_images(bad: Sequence[SkippedRow], max_bad_images: int | None, source: str) -> None:
    """Stop a run whose data have more bad images than are allowed.

    Raises:
        ValueError: there are more than `max_bad_images`; it names the first few.
    """
    if max_bad_images is not None and len(bad) > max_bad_images:
        raise ValueError(
            f"data.path: {source}: more than data.max_bad_images = {max_bad_images} images are bad "
            f"({format_rows(bad)}); repair them, or raise data.max_bad_images"
        )
