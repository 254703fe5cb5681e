"""Findings of checks: places in the data, what is wrong there, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.data.pairs import ImageRef
from mmalign.doctor.corpus import Case, Corpus, Kind, NotChecked

Level = Literal["error", "warning"]
PAIRS: tuple[Kind, ...] = ("image pairs", "response pairs")


@dataclass(frozen=True)
class Place:
    """Place of a defect.

    Attributes:
        location: the row or image: "pairs.parquet: row 17".
        detail: what is wrong there.
        texts: (name, text) of prompts and responses to show.
        images: (name, image) of images to show.
    """

    location: str
    detail: str
    texts: tuple[tuple[str, str], ...] = ()
    images: tuple[tuple[str, ImageRef], ...] = ()


@dataclass(frozen=True)
class Check:
    """Check of a corpus.

    Attributes:
        name: the name for reports and `--ignore`.
        level: an error spoils training or evaluation, a warning may.
        title: what its places have in common.
        advice: what to do about them.
        kinds: the kinds of data that it applies to.
        find: returns all places of the defect, or the reason why it did not look.
    """

    name: str
    level: Level
    title: str
    advice: str
    kinds: tuple[Kind, ...]
    find: Callable[[Corpus], Sequence[Place] | NotChecked]


@dataclass(frozen=True)
class Finding:
    """Result of a check: the places, empty if there is none, or the reason why it did not run."""

    check: Check
    places: Sequence[Place]
    not_checked: str = ""


def place(case: Case, detail: str) -> Place:
    """Return the place of a pair, with its texts and images to show."""
    if case.rejected.images == case.chosen.images:
        images = [("shared", ref) for ref in case.chosen.images]
    else:
        sides = (("chosen", case.chosen), ("rejected", case.rejected))
        images = [(name, ref) for name, side in sides for ref in side.images]
    texts = [("prompt", case.prompt), ("chosen", case.chosen.text), ("rejected", case.rejected.text)]
    return Place(case.location, detail, tuple(text for text in texts if text[1]), tuple(images))
