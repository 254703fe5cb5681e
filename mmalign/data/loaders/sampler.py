"""Deterministic order of an epoch and its batches, and the limit of bad rows.

The order depends on the seed, the epoch and the number of pairs, not on workers or on the starting batch. B pairs per
process and batch; a global batch has B pairs for every process. All pairs of a global batch have images of one size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Generator

from mmalign.data.pairs import Pairs, SkippedRow, format_rows
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Balance:
    """Share of liked rows in an epoch, whatever their share in the data.

    Attributes:
        liked: whether each row is liked.
        share: the share of liked rows.
    """

    liked: Sequence[bool]
    share: float

    @classmethod
    def of(cls, pairs: Pairs[Any], share: float | None) -> Balance | None:
        """Return the balance of some rows; None for no share.

        Raises:
            ValueError: no row is liked, or all are.
        """
        if share is None:
            return None
        liked = pairs.liked()
        if all(liked) or not any(liked):
            raise ValueError(
                f"method.liked_share: {share} cannot be had from {pairs.source}, where all labels are equal; set null "
                "to take the rows as they are"
            )
        return cls(liked, share)

    def apply(self, order: Sequence[int]) -> list[int]:
        """Return as many numbers as `order` has, `share` of them liked; rows of one label alone stay as they are.

        Rows of the scarcer label recur, and some of the other are left out. Both are spread evenly.
        """
        sides = [[number for number in order if self.liked[number] == side] for side in (True, False)]
        if not all(sides):
            return list(order)
        wanted = round(self.share * len(order))
        taken = [
            list(islice(cycle(side), number)) for side, number in zip(sides, (wanted, len(order) - wanted), strict=True)
        ]
        # Spread both sides evenly over the epoch
        placed = [((place + 0.5) / len(side), number) for side in taken for place, number in enumerate(side)]
        return [number for _, number in sorted(placed, key=lambda item: item[0])]


@dataclass(frozen=True)
class EpochSampler:
    """Assignment of pairs to batches.

    Attributes:
        num_pairs: number of pairs.
        batch_size: B.
        seed: the seed of the order.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        keep_last: pad the last batch of each size with pairs of weight 0 instead of dropping it, as evaluation needs.
        shapes: the size of each pair's images [num_pairs]; None for one size.
        balance: the share of liked rows in an epoch; None takes every row once.
    """

    num_pairs: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    keep_last: bool = False
    shapes: Sequence[Hashable] | None = None
    balance: Balance | None = None

    def __len__(self) -> int:
        """Return the batches per epoch; the partial last batch of a size counts with `keep_last`, or if it is alone."""
        sizes = Counter(self.shapes).values() if self.shapes is not None else [self.num_pairs]
        return sum(self._num_batches(number) for number in sizes)

    def _num_batches(self, number: int) -> int:
        """Return the batches of `number` pairs of one size."""
        full, rest = divmod(number, self.batch_size * self.world_size)
        return full + 1 if rest and (self.keep_last or not full) else full

    def order(self, epoch: int) -> list[int]:
        """Return the numbers of all pairs in the order in which all processes together take them."""
        seed = int(KeyedRNG(self.seed, epoch).integers([0], 0, 2**62, "order"))
        order: list[int] = torch.randperm(self.num_pairs, generator=Generator().manual_seed(seed)).tolist()
        if self.balance is None:
            return order
        # Balanced within each size, whose places in the order stay
        by_shape = defaultdict[Hashable, list[int]](list)
        for number in order:
            by_shape[self._shape(number)].append(number)
        balanced = {shape: iter(self.balance.apply(rows)) for shape, rows in by_shape.items()}
        return [next(balanced[self._shape(number)]) for number in order]

    def plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """Return (number, weight) of each pair, for every batch of this process."""
        first = self.rank * self.batch_size
        return [batch[first : first + self.batch_size] for batch in self._global_plan(epoch)]

    def taken(self, num_batches: int, cycle: int = 1) -> list[tuple[int, int]]:
        """Return (epoch, number) of each pair in the first `num_batches` batches of every process, sorted.

        Epochs repeat after `cycle` of them. More than one cycle takes every pair.
        """
        pairs = set[tuple[int, int]]()
        for epoch in range(-(-num_batches // len(self))):
            if epoch == cycle:
                return [(epoch, number) for epoch in range(cycle) for number in range(self.num_pairs)]
            batches = self._global_plan(epoch)[: num_batches - epoch * len(self)]
            pairs.update((epoch, number) for batch in batches for number, weight in batch if weight)
        return sorted(pairs)

    def split(self, numbers: Sequence[int]) -> list[list[tuple[int, float]]]:
        """Return (number, weight) of these pairs in batches of one size each, in the order of their first pairs."""
        by_shape = defaultdict[Hashable, list[tuple[int, float]]](list)
        for number in numbers:
            by_shape[self._shape(number)].append((number, 1.0))
        return [
            pairs[start : start + self.batch_size]
            for pairs in by_shape.values()
            for start in range(0, len(pairs), self.batch_size)
        ]

    def _shape(self, number: int) -> Hashable:
        return self.shapes[number] if self.shapes is not None else None

    def _global_plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """Return (number, weight) of each pair, for every global batch; a batch is where its last pair is in order."""
        size, batches = self.batch_size * self.world_size, list[list[tuple[int, float]]]()
        # Pairs wait, by size, until a global batch of that size is full
        waiting, taken, first = defaultdict[Hashable, list[int]](list), Counter[Hashable](), dict[Hashable, list[int]]()
        order = self.order(epoch)
        totals = Counter(map(self._shape, order))
        for number in order:
            shape = self._shape(number)
            batch = waiting[shape]
            batch.append(number)
            taken[shape] += 1
            # The last pairs of a size make a batch only for evaluation, or where the size would have none
            is_last = taken[shape] == totals[shape] and (self.keep_last or totals[shape] < size)
            if len(batch) < size and not is_last:
                continue
            # Pad the last batch with pairs of the same size from the start, of weight 0
            pads = first.setdefault(shape, list(batch))
            planned = [(pair, 1.0) for pair in batch]
            batches.append(planned + [(pads[i % len(pads)], 0.0) for i in range(size - len(batch))])
            batch.clear()
        return batches


def check_max_bad(bad: Sequence[SkippedRow], max_bad: int | None, source: str) -> None:
    """Check the number of bad rows and images against the limit.

    Raises:
        ValueError: there are more than `max_bad`; the message names the first few.
    """
    if max_bad is not None and len(bad) > max_bad:
        raise ValueError(
            f"data.path: {source}: more than data.max_bad = {max_bad} rows and images are bad "
            f"({format_rows(bad)}); repair them, or raise data.max_bad"
        )
