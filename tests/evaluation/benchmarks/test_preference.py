"""Win rates: counted by hand, and symmetric in the two sides."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from mmalign.evaluation.benchmarks.preference import compare_scores, measure_scores
from mmalign.evaluation.metrics import Metrics, Table
from mmalign.evaluation.statistics import paired_difference, proportion


def measure(scores: ArrayLike, base: ArrayLike, groups: ArrayLike | None = None) -> Metrics:
    keys = tuple(range(np.size(scores)))
    return measure_scores(scores, base, keys, keys if groups is None else tuple(np.asarray(groups).tolist()))


def compare(before: ArrayLike, after: ArrayLike, groups: ArrayLike | None = None) -> tuple[dict[str, Any], Table]:
    return compare_scores(measure(before, before, groups), measure(after, before, groups))


def test_win_rate_by_hand() -> None:
    """Two wins, one loss, one tie: (2 + 1/2) / 4."""
    before, after = [1.0, 2.0, 3.0, 4.0], [2.0, 5.0, 2.5, 4.0]
    result, (header, row) = compare(before, after)
    assert {name: result[name] for name in ("wins", "losses", "ties")} == {"wins": 2, "losses": 1, "ties": 1}
    assert result["win_rate"]["estimate"] == measure(after, before).values["win rate"] == 0.625
    assert result["win_rate"] == proportion([1, 1, 0, 0.5]).as_dict()
    assert result["difference"] == paired_difference([0, 0, 0, 0], [1.0, 3.0, -0.5, 0.0]).as_dict()
    assert measure(after, before).values["mean score"] == np.mean(after)
    assert len(header) == len(row) and row[:3] == ("2", "1", "1") and row[3].startswith("62.5 [")


def test_win_rate_of_swapped_sides_mirrors() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(0, 1, 50), rng.normal(0.3, 1, 50)
    forward, backward = (compare(*sides)[0]["win_rate"] for sides in ((before, after), (after, before)))
    assert (backward["estimate"], backward["low"], backward["high"]) == pytest.approx(
        (1 - forward["estimate"], 1 - forward["high"], 1 - forward["low"])
    )


def test_scores_equal_up_to_rounding_tie() -> None:
    before = np.array([21.5, 19.25, 0.0])
    result = compare(before, before * (1 + 1e-7))[0]
    assert (result["wins"], result["losses"], result["ties"]) == (0, 0, 3)
    assert result["win_rate"]["low"] < result["win_rate"]["estimate"] == 0.5 < result["win_rate"]["high"]


def test_win_rate_is_wider_with_groups() -> None:
    after = np.repeat(np.random.default_rng(2).normal(0.2, 1, 20), 4)
    widths = [
        rate["high"] - rate["low"]
        for rate in (
            compare(np.zeros(80), after, groups)[0]["win_rate"] for groups in (None, np.repeat(np.arange(20), 4))
        )
    ]
    assert widths[1] > 1.5 * widths[0]


def test_win_rate_refuses_a_score_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="score 0 of 2 is nan"):
        compare([1.0, 2.0], [float("nan"), 1.0])
