"""Judged rows: images for one prompt, or responses to one prompt with images; two of them are a pair.

A row of one output with a label is a thumb, a row of several outputs with scores a list. A pair needs no scores: its
chosen output comes first.

A pair of images may have two prompts, one for the chosen and one for the rejected image. Images are read on access.

There are three identities:

* A *key* is a hash of an image's bytes, for caches. No name or time stamp stands for it.
* A *row* names a pair, for random draws: 63 bits from the prompt and the images' names in their source. It does not
  change when the data are copied, reordered or subsetted.
* A *group* names pairs that stay on one side of a validation split.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Literal, NoReturn, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeVar

from mmalign.data.label import NO_LABEL, Label, with_label
from mmalign.language.chat import Turn


@dataclass(frozen=True)
class ImageRef:
    """Reference to an image, read on access.

    Attributes:
        key: the name of its content; other content has another key.
        path: the path of its file; empty for an image in a table.
    """

    key: str
    _locate: Callable[[], str] = field(repr=False, compare=False)
    _load: Callable[[], bytes] = field(repr=False, compare=False)
    path: str = field(default="", compare=False)

    @property
    def location(self) -> str:
        """Location of the image for messages: "pairs.parquet: row 17, jpg_0"."""
        return self._locate()

    def without_loader(self) -> ImageRef:
        """Return a reference that cannot be read; a loader over a table would copy the table to other processes."""
        return replace(self, _load=partial(_raise_read_again, self._locate))

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            OSError: the file cannot be read.
        """
        return self._load()


def _raise_read_again(locate: Callable[[], str]) -> NoReturn:
    raise AssertionError(f"{locate()}: the image of an encoded pair is in its batch, and is not read again")


@dataclass(frozen=True)
class ImagePair:
    """Images for one prompt: a pair, a thumb or a list.

    Attributes:
        row: 63-bit id that seeds the pair's random draws.
        prompt: the prompt of all images; in a pair with two prompts, that of the chosen image.
        outputs: the judged images, in a pair the preferred one first.
        group: the pair's group in `split_by_group`.
        rejected_prompt: the rejected image's prompt; empty in a pair with one prompt.
        source: the image that both images are edits of; None for images from a prompt alone.
        label: the pair's label.
        scores: the score of each image, larger is better; of a thumb 1 or 0. Empty for a pair.
        attributes: the ratings of each image, NaN where there is none; empty where nothing reads any.
    """

    row: int
    prompt: str
    outputs: tuple[ImageRef, ...]
    _locate: Callable[[], str] = field(repr=False, compare=False)
    group: str
    rejected_prompt: str = ""
    source: ImageRef | None = None
    label: Label = NO_LABEL
    scores: tuple[float, ...] = ()
    attributes: tuple[tuple[float, ...], ...] = ()

    @property
    def chosen(self) -> ImageRef:
        """The preferred image of a pair."""
        return self.outputs[0]

    @property
    def rejected(self) -> ImageRef:
        """The other image of a pair."""
        return self.outputs[1]

    @property
    def location(self) -> str:
        """Location of the pair for messages: "pairs.parquet: row 17"."""
        return self._locate()

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Judged images and, if there is one, the source."""
        return (*self.outputs, *([self.source] if self.source is not None else []))

    @property
    def content(self) -> tuple[str, ...]:
        """Prompts, images, scores and ratings."""
        judged = map(repr, (*self.scores, *self.attributes))
        return (self.prompt, self.rejected_prompt, *(image.key for image in self.images), *judged)

    @property
    def identity(self) -> tuple[str, ...]:
        """Content and label."""
        return with_label(self.content, self.label)


@dataclass(frozen=True)
class ResponsePair:
    """Responses to one prompt with images: a pair, a thumb or a list.

    Attributes:
        row: 63-bit id that seeds the pair's random draws.
        turns: the conversation that the responses answer.
        chosen: the preferred response of a pair, else the first.
        rejected: the next response; empty in rows of one response.
        images: the images, in the order of their placeholders in the prompt.
        rejected_images: the images of the rejected response; usually the same.
        other_images: further images of the pair, such as Re-Align's retrieved image.
        location: the pair's location, for messages.
        group: the pair's group in `split_by_group`.
        hallucinated: a second rejected response, induced by misleading a model; empty if there is none.
        label: the pair's label.
        others: the responses of a list after the second.
        scores: the score of each response, larger is better; of a thumb 1 or 0. Empty for a pair.
        truth: the texts of the true answer, for judges of generated responses.
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
    label: Label = NO_LABEL
    others: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    truth: tuple[str, ...] = ()

    @property
    def responses(self) -> tuple[str, ...]:
        """All responses in order, without the hallucinated one; none for a prompt alone."""
        return (*filter(None, [self.chosen, self.rejected]), *self.others)

    @property
    def content(self) -> tuple[str, ...]:
        """Conversation, responses, images, scores and the true answer."""
        roles = (self.images, self.rejected_images, self.other_images)
        keys = ("|".join(image.key for image in images) for images in roles)
        texts = (repr(self.turns), self.chosen, self.rejected, self.hallucinated, *self.others)
        return (*texts, *keys, *map(repr, self.scores), *self.truth)

    @property
    def identity(self) -> tuple[str, ...]:
        """Content and label."""
        return with_label(self.content, self.label)


def output_names(number: int, scores: Sequence[float]) -> list[str]:
    """Return names of a row's outputs: chosen and rejected, liked or disliked, or their places with their scores."""
    if not scores:
        return ["chosen", "rejected"][:number]
    if number == 1:
        return ["liked" if scores[0] > 0 else "disliked"]
    return [f"{place}. (score {score:g})" for place, score in enumerate(scores, start=1)]


P = TypeVar("P", default=ImagePair, covariant=True)


Defect = Literal["missing image", "same sides", "two prompts", "unusable"]  # kind of a skipped row


@dataclass(frozen=True)
class SkippedRow:
    """Location of skipped data, the reason, and its kind."""

    location: str
    reason: str
    defect: Defect = "unusable"

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


class UnusableRowError(ValueError):
    """Error for a row that cannot be used for training; the row is skipped, counted and named.

    Attributes:
        defect: the kind of the reason.
    """

    def __init__(self, reason: str, defect: Defect = "unusable") -> None:
        super().__init__(reason)
        self.defect = defect


class Row(Protocol):
    """Pair or prompt with an id and with texts that stand for all of its content."""

    @property
    def row(self) -> int:
        """63-bit id that seeds random draws."""

    @property
    def content(self) -> tuple[str, ...]:
        """Texts and keys of images; another pair, or the same with its sides exchanged, has others."""

    @property
    def identity(self) -> tuple[str, ...]:
        """Content, and the label of a pair."""


class Rows(Protocol[P]):
    """Interface of a source: pairs by number, built on access."""

    def pair(self, number: int) -> P:
        """Return the pair of that number."""

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the groups of those pairs, without building the pairs."""

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return every prompt of those pairs, without building the pairs; a pair may have two."""

    def liked(self, numbers: NDArray[np.int64]) -> list[bool]:
        """Return whether the best score of each row is above 0, without building the rows; True for pairs."""

    def annotators(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the annotator of each pair, "" for none, without building the pairs."""


@dataclass(frozen=True, eq=False, repr=False)
class Pairs(Sequence[P], Generic[P]):
    """Sequence of pairs of one source; subsets (`select`, slices, `split_by_group`) copy indices, not images.

    Attributes:
        source: the source's name, for messages.
        skipped: the rows that indexing skipped.
        tied: locations of the pairs skipped because neither image is preferred; one for each pair.
        layout: the layout that was recognized, with its columns; empty if it was named.
        unread: the columns that nothing reads.
    """

    source: str
    _rows: Rows[P]
    _numbers: NDArray[np.int64]
    skipped: Sequence[SkippedRow] = ()
    tied: Sequence[str] = ()
    layout: str = ""
    unread: Sequence[str] = ()

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
        """Return the pairs with these numbers, in this order."""
        return replace(self, _numbers=self._numbers[np.asarray(numbers, dtype=np.int64)])

    @property
    def ties(self) -> int:
        """Number of pairs skipped because neither image is preferred."""
        return len(self.tied)

    def groups(self) -> list[str]:
        """Return the group of every pair."""
        return self._rows.groups(self._numbers)

    def prompts(self) -> list[str]:
        """Return every prompt of the pairs: one or two for each."""
        return self._rows.prompts(self._numbers)

    def liked(self) -> list[bool]:
        """Return for every thumb whether it is up."""
        return self._rows.liked(self._numbers)

    def annotators(self) -> list[str]:
        """Return the annotator of every pair, "" for none."""
        return self._rows.annotators(self._numbers)

    def require(self, expected: str) -> None:
        """Check that there are pairs.

        Raises:
            ValueError: there is none; the message names the first skipped rows and the `expected` rows.
        """
        if not len(self):
            why = f": {format_rows(self.skipped)}" if self.skipped else ""
            # Mostly missing images: their folder is probably another one
            missing = sum(row.defect == "missing image" for row in self.skipped) * 2 > len(self.skipped)
            raise ValueError(
                f"data.path: {self.source} has no pair to learn from ({count(self.ties, 'tie')}, "
                f"{count(len(self.skipped), 'row')} dropped{why}); expected rows {expected}"
                + ("; data.images names the folder of the images" if missing else "")
            )

    def summary(self) -> str:
        """Return one paragraph with the numbers of pairs, groups, ties and skipped rows."""
        groups = len(set(self.groups()))
        text = f"{count(len(self), 'pair')} in {count(groups, 'group')} from {self.source}"
        if self.layout:
            text += f", read as {self.layout}; data.format and data.columns name others"
        if self.unread:
            names = ", ".join(self.unread)
            text += f"; nothing reads {'column' if len(self.unread) == 1 else 'columns'} {names:.300}"
        if self.ties:
            text += f"; {count(self.ties, 'tie')} left out"
        if self.skipped:
            text += f"; {count(len(self.skipped), 'row')} dropped ({format_rows(self.skipped)})"
        return text + "."


def pair_key(pair: Row) -> str:
    """Return the cache key of a pair or prompt: its row id and its content."""
    return f"{pair.row:x}-{stable_hash(*pair.content):x}"


def fingerprint_pairs(pairs: Sequence[Row]) -> str:
    """Return a hash of the pairs' order, content and labels, and of which side is preferred."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(stable_hash(*pair.identity).to_bytes(8, "big"))
    return digest.hexdigest()


def stable_hash(*parts: str) -> int:
    """Return a 63-bit hash of a sequence of strings, the same on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)  # lengths tell ("ab", "c") from ("a", "bc")
    return int.from_bytes(digest.digest(), "big") >> 1


SHOWN = 3  # skipped rows in a message
_DETAIL = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'|\S*\d\S*")  # names and numbers in a reason


def format_rows(dropped: Sequence[SkippedRow]) -> str:
    """Format a few skipped rows for a message, those of the commonest reason first, with the number of these."""
    reasons = [_DETAIL.sub("", row.reason) for row in dropped]
    numbers = Counter(reasons)
    order = sorted(range(len(dropped)), key=lambda n: -numbers[reasons[n]])
    more, same = len(dropped) - SHOWN, numbers[reasons[order[0]]] if dropped else 0
    text = "; ".join(str(dropped[n]) for n in order[:SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
    return f"{same:,} for one reason: {text}" if more > 0 and len(numbers) > 1 < same else text


def count(number: int, word: str) -> str:
    """Return "1 pair", "2 pairs" and so on."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")
