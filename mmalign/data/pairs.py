"""Preference pairs: two images for one prompt, or two responses to images; one of them is preferred.

A pair of images may come with two prompts: the chosen image is of the one, and the rejected image of the other.

Nothing is read before it is asked for.

Three identities. A *key* names an image's content (it changes when the file does), for caches. A *row* names a pair
(63 bits, from the prompt and the images' names in their source), for random draws; it does not change when the data are
copied, reordered or subsetted. A *group* names what a hold-out must not tear apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeVar

from mmalign.language.chat import Turn


@dataclass(frozen=True)
class ImageRef:
    """An image that has not been read.

    Attributes:
        key: names its content; another content has another key.
        location: where it lies, for people: "pairs.parquet: row 17, jpg_0".
        path: of its file; empty for an image in a table.
    """

    key: str
    location: str
    _load: Callable[[], bytes] = field(repr=False, compare=False)
    path: str = field(default="", compare=False)

    def read(self) -> bytes:
        """The encoded image, read now.

        Raises:
            OSError: the file cannot be read.
        """
        return self._load()


@dataclass(frozen=True)
class ImagePair:
    """Two images for one prompt.

    Attributes:
        row: 63 bits that name the pair in every draw of random numbers.
        prompt: what both images should show; in a pair with two prompts, what the chosen one shows.
        chosen: the preferred image.
        rejected: the other one.
        location: where the pair lies, for people.
        group: pairs of one group stay together in `split_by_group`.
        rejected_prompt: what the rejected image shows; empty in a pair with one prompt.
    """

    row: int
    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    location: str
    group: str
    rejected_prompt: str = ""


@dataclass(frozen=True)
class ResponsePair:
    """Two responses to one prompt with images.

    Attributes:
        row: 63 bits that name the pair in every draw of random numbers.
        turns: the conversation that both responses answer.
        chosen: the preferred response.
        rejected: the other one; empty in rows of answers alone, which methods are never given.
        images: in the order of their places in the prompt.
        rejected_images: those that the rejected response is an answer to; most often the same.
        other_images: further ones that came with the pair, such as Re-Align's retrieved image.
        location: where the pair lies, for people.
        group: pairs of one group stay together in `split_by_group`.
        hallucinated: a second rejected response, which a model was led to; empty if the pair came without.
    """

    row: int
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str
    images: tuple[ImageRef, ...]
    rejected_images: tuple[ImageRef, ...]
    other_images: tuple[ImageRef, ...]
    location: str
    group: str
    hallucinated: str = ""


P = TypeVar("P", default=ImagePair, covariant=True)


@dataclass(frozen=True)
class SkippedRow:
    """Something that was left out, and why."""

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


class Rows(Protocol[P]):
    """What a source offers: pairs by number, built when asked for."""

    def pair(self, number: int) -> P:
        """The pair of that number."""

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """The groups of those pairs, without building them."""

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Every prompt of those pairs, without building them; a pair may have two."""


class Pairs(Sequence[P], Generic[P]):
    """Pairs of one source; taking some of them (`select`, a slice, `split_by_group`) moves numbers, not images.

    Attributes:
        source: what was opened, for people.
        skipped: what its index left out.
        ties: how many pairs were left out because neither image is preferred.
    """

    def __init__(
        self, source: str, rows: Rows[P], numbers: NDArray[np.int64], dropped: Sequence[SkippedRow] = (), ties: int = 0
    ) -> None:
        self.source, self.skipped, self.ties = source, tuple(dropped), ties
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> P: ...
    @overload
    def __getitem__(self, number: slice) -> Pairs[P]: ...
    def __getitem__(self, number: int | slice) -> P | Pairs[P]:
        if isinstance(number, slice):
            return self.select(np.arange(len(self))[number])
        return self._rows.pair(int(self._numbers[number]))

    def select(self, numbers: Sequence[int] | NDArray[np.int64]) -> Pairs[P]:
        """The pairs of these numbers, in this order."""
        chosen = self._numbers[np.asarray(numbers, dtype=np.int64)]
        return Pairs(self.source, self._rows, chosen, self.skipped, self.ties)

    def groups(self) -> list[str]:
        """The group of every pair."""
        return self._rows.groups(self._numbers)

    def prompts(self) -> list[str]:
        """Every prompt of the pairs: one of each, or two."""
        return self._rows.prompts(self._numbers)

    def summary(self) -> str:
        """One paragraph: how many pairs there are, and what was left out and why."""
        groups = len(set(self.groups()))
        text = f"{_count(len(self), 'pair')} in {_count(groups, 'group')} from {self.source}"
        if self.ties:
            text += f"; {_count(self.ties, 'tie')} left out"
        if self.skipped:
            text += f"; {_count(len(self.skipped), 'row')} dropped ({format_rows(self.skipped)})"
        return text + "."


def split_by_group(pairs: Pairs[P], fraction: float, seed: int) -> tuple[Pairs[P], Pairs[P]]:
    """Split by group: (to train on, held out).

    A group's side depends on its name and the seed alone, so adding data moves no pair to the other side; the share
    held out is therefore `fraction` only on average.

    Raises:
        ValueError: one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction: {fraction} is not a share; expected a number between 0 and 1")
    groups = pairs.groups()
    held_groups = {g for g in set(groups) if stable_hash(str(seed), "hold out", g) < fraction * 2**63}
    held = np.array([g in held_groups for g in groups], dtype=bool)
    if held.all() or not held.any():
        side = "training" if held.all() else "evaluation"
        raise ValueError(
            f"data.validation_fraction: {fraction} of {_count(len(set(groups)), 'group')} in {pairs.source} leaves "
            "none for "
            f"{side}; use another share, or data.group_by with a column of more values"
        )
    return pairs.select(np.flatnonzero(~held)), pairs.select(np.flatnonzero(held))


def stable_hash(*parts: str) -> int:
    """63 bits that name a sequence of strings."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)  # with lengths: ("ab", "c") is not ("a", "bc")
    return int.from_bytes(digest.digest(), "big") >> 1


def format_rows(dropped: Sequence[SkippedRow], most: int = 3) -> str:
    """The first few, for a message."""
    more = len(dropped) - most
    return "; ".join(str(d) for d in dropped[:most]) + (f"; and {more:,} more" if more > 0 else "")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
