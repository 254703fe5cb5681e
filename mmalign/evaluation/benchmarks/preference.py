"""Win rate and mean change of score of outputs after alignment against those before, by a judge.

Shapes: N pairs of images, each of one prompt and seed, or of answers, each to one question.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import ArrayLike

from mmalign.evaluation.metrics import Metrics, Table, ratio
from mmalign.evaluation.statistics import outcomes, paired_difference, proportion


def measure_scores(
    scores: ArrayLike,
    base_scores: ArrayLike,
    keys: tuple[Hashable, ...],
    groups: tuple[Hashable, ...],
    outputs: str = "images",
) -> Metrics:
    """Return the win rate over the base model and the mean score.

    A tie is half a win (`statistics.outcomes`). Scores, keys and groups are [N]: prompt and seed, and the prompt,
    or question and image.
    """
    own, base = np.asarray(scores, dtype=np.float64), np.asarray(base_scores, dtype=np.float64)
    columns = {outputs: np.ones(len(own)), "wins": outcomes(own, base), "mean score": own}
    return Metrics("preference", keys, groups, columns, {"win rate": ratio("wins", outputs)}, ("mean score",))


def compare_scores(before: Metrics, after: Metrics) -> tuple[dict[str, object], Table]:
    """Return the result of benchmark preference for result.json, and its table.

    Raises:
        ValueError: a score is not finite, or there are fewer than two groups.
    """
    wins, groups = after.columns["wins"], after.groups
    difference = paired_difference(before.columns["mean score"], after.columns["mean score"], groups)
    win_rate = proportion(wins, groups)
    counts: dict[str, object] = {"wins": int((wins == 1).sum()), "losses": int((wins == 0).sum())}
    counts["ties"] = int((wins == 0.5).sum())
    table = [
        ("wins", "losses", "ties", "win rate, %", "mean change of score"),
        (*map(str, counts.values()), win_rate.points(signed=False), str(difference)),
    ]
    return {**counts, "win_rate": win_rate.as_dict(), "difference": difference.as_dict()}, table
