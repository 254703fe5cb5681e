"""How often a judge prefers the image after alignment to the one before, and by how much.

N pairs, each of one prompt and seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mmalign.evaluation.intervals import Interval, paired_difference


@dataclass(frozen=True)
class Preference:
    """A judge's verdict: a win is a higher score after; the win rate counts a tie as one half.

    `difference` is the mean of after - before in the judge's own unit.
    """

    wins: int
    losses: int
    ties: int
    win_rate: Interval
    difference: Interval

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first: wins, losses, ties, the win rate in percent, the mean change of the score."""
        counts = (str(self.wins), str(self.losses), str(self.ties))
        return [
            ("wins", "losses", "ties", "win rate, %", "mean change of score"),
            (*counts, self.win_rate.points(signed=False), str(self.difference)),
        ]

    def as_dict(self) -> dict[str, object]:
        """Numbers for `result.json`; the win rate in [0, 1]."""
        counts: dict[str, object] = {"wins": self.wins, "losses": self.losses, "ties": self.ties}
        return {**counts, "win_rate": self.win_rate.as_dict(), "difference": self.difference.as_dict()}


def compare_scores(before: ArrayLike, after: ArrayLike, groups: Sequence[Hashable] | None = None) -> Preference:
    """The judge's verdict on N pairs, with 95 % intervals.

    With s = +1, 0, -1 for a win, a tie, a loss, the win rate is (1 + mean(s)) / 2, and its interval follows from that
    of the paired difference mean(s). An interval of decisive pairs alone (Wilson) would ignore both the ties and the
    dependence of several seeds of one prompt. Scores that agree to within float32 rounding tie: equal images judged
    in other batches differ by as much, and their order would be a coin's.

    Args:
        before: [N] the judge's scores, higher is better.
        after: [N] the same of the other side, in the same order.
        groups: [N] what dependent pairs share, such as the prompt.

    Raises:
        ValueError: lengths differ, a score is not finite, or there are fewer than two pairs or groups.
    """
    difference = paired_difference(before, after, groups)
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    tie = np.isclose(second, first, rtol=1e-6, atol=1e-8)
    won, lost = (second > first) & ~tie, (second < first) & ~tie
    sign = paired_difference(lost, won, groups)
    win_rate = Interval(*((1 + x) / 2 for x in (sign.estimate, sign.low, sign.high)))
    return Preference(int(won.sum()), int(lost.sum()), int(tie.sum()), win_rate, difference)
