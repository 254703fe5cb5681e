"""Win rates: counted by hand, and symmetric in the two sides."""

import json

import numpy as np
import pytest

from mmalign.evaluation.intervals import paired_difference
from mmalign.evaluation.preference import compare_scores


def test_by_hand() -> None:
    """Two wins, one loss, one tie: (2 + 1/2) / 4; s = 1, 1, -1, 0 has mean 0.25."""
    found = compare_scores([1.0, 2.0, 3.0, 4.0], [2.0, 5.0, 2.5, 4.0])
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert found.win_rate.estimate == 0.625
    assert found.difference == paired_difference([0, 0, 0, 0], [1.0, 3.0, -0.5, 0.0])
    sign = paired_difference([0, 0, 1, 0], [1, 1, 0, 0])
    assert found.win_rate.low == pytest.approx((1 + sign.low) / 2)
    assert 0 <= found.win_rate.low <= found.win_rate.high <= 1


def test_swapping_sides_mirrors_the_rate() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(0, 1, 50), rng.normal(0.3, 1, 50)
    ours, theirs = compare_scores(before, after).win_rate, compare_scores(after, before).win_rate
    assert (theirs.estimate, theirs.low, theirs.high) == pytest.approx((1 - ours.estimate, 1 - ours.high, 1 - ours.low))


def test_rounding_is_a_tie() -> None:
    before = np.array([21.5, 19.25, 0.0])
    found = compare_scores(before, before * (1 + 1e-7))
    assert (found.wins, found.losses, found.ties) == (0, 0, 3)
    assert found.win_rate.estimate == 0.5
    assert found.win_rate.low < 0.5 < found.win_rate.high


def test_groups_widen() -> None:
    rng = np.random.default_rng(2)
    after = np.repeat(rng.normal(0.2, 1, 20), 4)
    groups = np.repeat(np.arange(20), 4).tolist()
    loose, strict = compare_scores(np.zeros(80), after).win_rate, compare_scores(np.zeros(80), after, groups).win_rate
    assert strict.high - strict.low > 1.5 * (loose.high - loose.low)


def test_table_and_dict() -> None:
    found = compare_scores([1.0, 2.0, 3.0], [2.0, 5.0, 2.5])
    header, row = found.table()
    assert len(header) == len(row)
    assert row[:3] == ("2", "1", "0")
    assert row[3].startswith("66.7 [")
    assert json.loads(json.dumps(found.as_dict()))["wins"] == 2


def test_refuses() -> None:
    with pytest.raises(ValueError, match="2 scores before but 1 after"):
        compare_scores([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="after: score 0 of 2 is nan"):
        compare_scores([1.0, 2.0], [float("nan"), 1.0])
