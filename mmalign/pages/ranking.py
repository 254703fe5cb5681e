"""Ranking of gallery entries by their change of score, into gains and regressions.

Scores are pairs (before, after); higher is better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from mmalign.evaluation.statistics import ties

Kind = Literal["gained", "lost", "unchanged"]
Scores = tuple[float, float]

MARKS: dict[Kind, str] = {"gained": "▲", "lost": "▼", "unchanged": "="}
SECTIONS: tuple[tuple[Kind, str, str, str], ...] = (  # kind, heading, anchor, order
    ("gained", "Best gains", "best-gains", "largest gain first"),
    ("lost", "Worst regressions", "worst-regressions", "largest loss first"),
    ("unchanged", "Unchanged", "unchanged", "in the order measured"),
)


def kind(scores: Scores) -> Kind:
    """Return `gained`, `lost`, or `unchanged` if the scores agree to within float32 rounding."""
    before, after = scores
    if ties(before, after):
        return "unchanged"
    return "gained" if after > before else "lost"


def change(scores: Scores) -> float:
    """Return the score after minus the score before; 0 if unchanged, so that rounding does not affect the order."""
    return 0.0 if kind(scores) == "unchanged" else scores[1] - scores[0]


def tally(measured: Iterable[Scores]) -> dict[Kind, int]:
    """Count the entries of each kind."""
    kinds = Counter(map(kind, measured))
    return {name: kinds[name] for name in MARKS}


def ranked(measured: Sequence[Scores], wanted: Kind) -> list[int]:
    """Return the indices of a kind's entries, the largest change first; ties keep their order."""
    indices = (index for index, scores in enumerate(measured) if kind(scores) == wanted)
    return sorted(indices, key=lambda index: -abs(change(measured[index])))


def choose(measured: Sequence[Scores], number: int) -> dict[Kind, list[int]]:
    """Return the indices of at most `number` entries by kind: half best gains, half worst regressions.

    If one kind has fewer entries, the other has more. Without gains and regressions, return unchanged entries.
    """
    gained, lost = ranked(measured, "gained"), ranked(measured, "lost")
    num_lost = min(len(lost), max(number // 2, number - len(gained)))
    chosen: dict[Kind, list[int]] = {"gained": gained[: number - num_lost], "lost": lost[:num_lost]}
    return chosen if gained or lost else {"unchanged": ranked(measured, "unchanged")[:number]}


def spread(changes: Sequence[float], number: int) -> list[int]:
    """Return at most `number` indices: half for the largest changes, half for the smallest."""
    falling = sorted(range(len(changes)), key=lambda index: -changes[index])
    if len(falling) <= number:
        return falling
    best = falling[: (number + 1) // 2]
    rest = sorted(set(falling) - set(best), key=lambda index: (changes[index], index))
    return best + rest[: number - len(best)]


def format_scores(scores: Scores) -> tuple[str, str]:
    """Format both scores with three significant digits, and with more where a change would not be seen."""
    for digits in range(3, 9):
        before, after = (f"{score:.{digits}g}" for score in scores)
        if before != after or kind(scores) == "unchanged":
            break
    return before, after


def format_change(scores: Scores) -> str:
    """Format the change of a score with its sign and three significant digits."""
    return f"{change(scores):+.3g}"
