"""The order of an epoch and its batches, whatever they hold: the same wherever one begins, with any workers.

B pairs of a process's batch; a global batch is B pairs for every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from mmalign.data.pairs import Dropped, listed
from mmalign.rng import Draws


@dataclass(frozen=True)
class Epochs:
    """Which pairs are in which batch.

    Attributes:
        number: how many pairs there are.
        batch_size: B.
        seed: of the order.
        rank: this process among `world_size`.
        world_size: how many processes share an epoch.
        keep_last: fill up the last batch with pairs of weight 0 instead of leaving it out, as evaluation wants.
    """

    number: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    keep_last: bool = False

    def __len__(self) -> int:
        """Batches of an epoch: the last is left out if it is not full, unless `keep_last` or it is the only one."""
        full, rest = divmod(self.number, self.batch_size * self.world_size)
        return full + 1 if rest and (self.keep_last or not full) else full

    def order(self, epoch: int) -> list[int]:
        """The numbers of all pairs, in the order in which all processes together take them."""
        seed = int(Draws(self.seed, epoch).integers([0], 0, 2**62, "order"))
        order: list[int] = torch.randperm(self.number, generator=Generator().manual_seed(seed)).tolist()
        return order

    def plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """For every batch of this process, the numbers and weights of its pairs."""
        order = self.order(epoch)
        size = self.batch_size * self.world_size
        planned = [(number, 1.0) for number in order]
        planned += [(order[i % len(order)], 0.0) for i in range(len(self) * size - len(order))]
        first = [b * size + self.rank * self.batch_size for b in range(len(self))]
        return [planned[at : at + self.batch_size] for at in first]


class LeftOut:
    """What could not be used so far on this process, each once.

    Args:
        source: where it lies, for people.
        max_bad: stop if there is more than this; None never stops.
    """

    def __init__(self, source: str, max_bad: int | None) -> None:
        self.source, self.max_bad = source, max_bad
        self._there: dict[str, Dropped] = {}

    @property
    def all(self) -> list[Dropped]:
        """In the order in which they were met."""
        return list(self._there.values())

    def add(self, dropped: Sequence[Dropped]) -> None:
        """Take in more.

        Raises:
            ValueError: there are too many now.
        """
        self._there.update((d.where, d) for d in dropped)
        check_bad(self.all, self.max_bad, self.source)


def check_bad(bad: Sequence[Dropped], max_bad: int | None, source: str) -> None:
    """Stop a run whose data have more bad images than are allowed.

    Raises:
        ValueError: there are more than `max_bad`; it names the first few.
    """
    if max_bad is not None and len(bad) > max_bad:
        raise ValueError(
            f"data.path: {source}: more than data.max_bad = {max_bad} images are bad "
            f"({listed(bad)}); repair them, or raise data.max_bad"
        )
