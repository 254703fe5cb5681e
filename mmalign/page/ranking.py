"""What changed by how much: which entries of a page gained, which lost, and in what order they are shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

Kind = Literal["gained", "lost", "unchanged"]

MARKS: dict[Kind, str] = {"gained": "▲", "lost": "▼", "unchanged": "="}
SECTIONS: tuple[tuple[Kind, str, str, str], ...] = (  # kind, heading, anchor, order
    ("gained", "Best gains", "best-gains", "largest gain first"),
    ("lost", "Worst regressions", "worst-regressions", "largest loss first"),
    ("unchanged", "Unchanged", "unchanged", "in the order measured"),
)


class Entry(Protocol):
    """Something measured before and after alignment; a score is better when higher, a note says it in words."""

    @property
    def title(self) -> str:
        """What was asked for: a prompt, or a question."""

    @property
    def scores(self) -> tuple[float, float]:
        """Before, after."""

    @property
    def notes(self) -> tuple[str, str]:
        """Before, after; empty where there is nothing to say."""


def kind(entry: Entry) -> Kind:
    """`gained`, `lost`, or `unchanged` where the scores agree to within float32 rounding."""
    return _kind(*entry.scores)


def tally(scores: Iterable[tuple[float, float]]) -> dict[Kind, int]:
    """How many of each kind there are, of scores before and after."""
    kinds = Counter(_kind(before, after) for before, after in scores)
    return {which: kinds[which] for which in MARKS}


def _kind(before: float, after: float) -> Kind:
    if math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-8):
        return "unchanged"
    return "gained" if after > before else "lost"


def change(entry: Entry) -> float:
    """The score after less the score before; 0 where it is unchanged, so that rounding errors sort nothing."""
    before, after = entry.scores
    return 0.0 if kind(entry) == "unchanged" else after - before


def ranked(entries: Sequence[Entry], which: Kind) -> list[int]:
    """Indices of a kind's entries, the largest change first; equal changes stay in the order given."""
    return sorted((i for i, e in enumerate(entries) if kind(e) == which), key=lambda i: -abs(change(entries[i])))


def choose(entries: Sequence[Entry], number: int) -> dict[Kind, list[int]]:
    """At most `number` indices: half gains, half losses, each taking the room that the other does not need."""
    gained, lost = ranked(entries, "gained"), ranked(entries, "lost")
    num_lost = min(len(lost), max(number // 2, number - len(gained)))
    chosen: dict[Kind, list[int]] = {"gained": gained[: number - num_lost], "lost": lost[:num_lost]}
    return chosen if gained or lost else {"unchanged": ranked(entries, "unchanged")[:number]}


def spread(changes: Sequence[float], number: int) -> list[int]:
    """At most `number` indices: half of them of the largest changes, half of the smallest; all if there are no more."""
    falling = sorted(range(len(changes)), key=lambda i: -changes[i])
    if len(falling) <= number:
        return falling
    best = falling[: (number + 1) // 2]
    rest = sorted(set(falling) - set(best), key=lambda i: (changes[i], i))
    return best + rest[: number - len(best)]


def shown(value: float, sign: str = "") -> str:
    """A score, or with `sign` "+" a change, in three digits."""
    return f"{value:{sign}.3g}"
