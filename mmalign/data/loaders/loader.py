"""Deterministic, resumable loader of batches, for pairs of either modality and for prompts.

Batches do not depend on the number of workers or on the starting batch. B pairs per process and batch; a global batch
has B pairs for every process.

A pair that cannot be used stays in its batch with weight 0, so that no other pair moves. It is counted and named.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.loaders.sampler import Balance, EpochSampler, check_max_bad
from mmalign.data.pairs import Pairs, Row, SkippedRow, format_rows, pair_key

Plan = list[list[tuple[int, float]]]  # (number, weight) of each pair, for every batch


class Located(Row, Protocol):
    """Pair or prompt with a location for messages."""

    @property
    def location(self) -> str:
        """Location of the pair."""


P = TypeVar("P", bound=Located)
P_contra = TypeVar("P_contra", contravariant=True)
E = TypeVar("E")
B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
PlannedPair = tuple[P, float, E | list[SkippedRow]]  # pair, weight, example or reasons to skip it


class Reader(Protocol[P_contra, E, B_co]):
    """Reading of a modality's pairs as examples, and of examples as batches."""

    def read(self, pair: P_contra, epoch: int) -> E | list[SkippedRow]:
        """Return a pair's example, or the reasons to skip the pair.

        Raises:
            ValueError: a cache lacks the pair.
        """

    def collate(self, pairs: Sequence[P_contra], examples: Sequence[E], weights: Tensor) -> B_co:
        """Return the batch of B pairs; a skipped pair has weight 0 and another one's example."""


class Loader(Generic[P, E, B]):
    """Loader of batches, epoch by epoch.

    Attributes:
        reader: the reading of examples and batches.

    Args:
        pairs: the pairs or prompts to load.
        reader: the modality's reader.
        batch_size: B, pairs per batch on this process.
        seed: the seed of the order.
        num_workers: number of processes that read; 0 reads in this one.
        rank: index of this process.
        world_size: number of processes that share an epoch.
        max_bad: most bad rows and images of the source, with those that indexing skipped; None allows any number.
        keep_last: pad the last batch with pairs of weight 0 instead of dropping it, as evaluation needs.
        shapes: the size of each pair's images [N], which a batch has in common; None for one size.
        liked_share: share of liked rows in an epoch; None takes every row once.

    Raises:
        ValueError: there are no pairs, or no liked or no disliked ones to balance.
    """

    def __init__(
        self,
        pairs: Pairs[P],
        reader: Reader[P, E, B],
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int | None = None,
        keep_last: bool = False,
        shapes: Sequence[Hashable] | None = None,
        liked_share: float | None = None,
    ) -> None:
        if not len(pairs):
            raise ValueError(f"data: {pairs.source} has no pairs left to load; hold out less, or raise data.limit")
        self.pairs, self.reader, self.num_workers = pairs, reader, num_workers
        balance = Balance.of(pairs, liked_share)
        self.sampler = EpochSampler(len(pairs), batch_size, seed, rank, world_size, keep_last, shapes, balance)
        self._max_bad, self._skipped = max_bad, dict[str, SkippedRow]()
        self._first = 0  # number of the first pair that is not known to be bad
        self._keys = dict[int, str]()

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.sampler)

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows skipped so far on this process, each once."""
        return list(self._skipped.values())

    def _skip(self, rows: Sequence[SkippedRow]) -> None:
        self._skipped.update((row.location, row) for row in rows)
        check_max_bad([*self.pairs.skipped, *self.skipped], self._max_bad, self.pairs.source)

    def key(self, number: int) -> str:
        """Return the key of a pair's content, by number."""
        if number not in self._keys:
            self._keys[number] = pair_key(self.pairs[number])
        return self._keys[number]

    def batches(self, epoch: int, start: int = 0) -> Iterator[B]:
        """Yield the batches of an epoch from number `start`, without reading earlier ones.

        Raises:
            ValueError: no pair can be used, more than `max_bad` rows are bad, or a cache lacks a pair.
        """
        return self._read(epoch, self.sampler.plan(epoch)[start:])

    def read_pairs(self, epoch: int, numbers: Sequence[int]) -> Iterator[B]:
        """Yield batches of the pairs with these numbers as that epoch reads them, in this order per image size."""
        return self._read(epoch, self.sampler.split(numbers))

    def _read(self, epoch: int, plan: Plan) -> Iterator[B]:
        examples: _Examples[P, E, B] = _Examples(self.pairs, self.reader, epoch)
        loader = DataLoader(
            examples,
            batch_sampler=plan,
            collate_fn=partial(_collate, self.reader),
            num_workers=self.num_workers,
            generator=Generator().manual_seed(0),  # otherwise it would advance the global generator
        )
        batch: B | None
        for planned, (batch, skipped) in zip(plan, loader, strict=True):
            self._skip(skipped)
            if batch is None:  # no pair of the batch can be used
                # Rows keep their ids; an example of another pair, of weight 0, gives the shapes
                _, example = self._first_usable()
                pairs = [self.pairs[number] for number, _ in planned]
                batch = self.reader.collate(pairs, [example] * len(pairs), torch.zeros(len(pairs)))
            yield batch

    def check_readable(self) -> P:
        """Return the first usable pair, whose example fills a batch without any usable pair.

        Raises:
            ValueError: no pair is usable, or more than `max_bad` rows are bad; the message names the first few.
        """
        return self._first_usable()[0]

    def _first_usable(self) -> tuple[P, E]:
        for number in range(self._first, len(self.pairs)):
            pair = self.pairs[number]
            example = self.reader.read(pair, 0)
            if not isinstance(example, list):
                self._first = number
                return pair, example
            self._skip(example)
        raise ValueError(
            f"data.path: {self.pairs.source}: none of {len(self.pairs):,} pairs can be used "
            f"({format_rows(self.skipped)}); repair them, or name another source"
        )

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Return the locations of a batch's pairs, for messages."""
        return [self.pairs[pair].location for pair, weight in self.sampler.plan(epoch)[number] if weight]


class _Examples(Dataset[PlannedPair[P, E]], Generic[P, E, B]):
    """Dataset of rows by (number, weight)."""

    def __init__(self, pairs: Pairs[P], reader: Reader[P, E, B], epoch: int) -> None:
        self.pairs, self.reader, self.epoch = pairs, reader, epoch

    def __getitem__(self, number_and_weight: tuple[int, float]) -> PlannedPair[P, E]:
        number, weight = number_and_weight
        pair = self.pairs[number]
        return pair, weight, self.reader.read(pair, self.epoch)


def _collate(reader: Reader[P, E, B], rows: Sequence[PlannedPair[P, E]]) -> tuple[B | None, list[SkippedRow]]:
    """Return the batch, or None if no pair can be used, and the skipped rows."""
    skipped = [row for _, _, example in rows if isinstance(example, list) for row in example]
    stand_in = next((example for _, _, example in rows if not isinstance(example, list)), None)
    if stand_in is None:
        return None, skipped
    examples = [stand_in if isinstance(example, list) else example for _, _, example in rows]
    weights = torch.tensor([0.0 if isinstance(example, list) else weight for _, weight, example in rows])
    return reader.collate([pair for pair, _, _ in rows], examples, weights), skipped
