"""Intervals: worked by hand, against scipy, and by the coverage they promise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmalign.evaluation.statistics import (
    Interval,
    cluster_jackknife,
    correct,
    outcomes,
    paired,
    paired_difference,
    proportion,
    ties,
)


def test_interval_formats() -> None:
    interval = Interval(0.0586, 0.0262, 0.0917)
    assert interval.points() == "+5.9 [2.6, 9.2]"
    assert interval.points(signed=False) == "5.9 [2.6, 9.2]"
    assert str(interval) == "0.0586 [0.0262, 0.0917]"
    assert Interval(-0.01, -0.04, 0.02).points() == "-1.0 [-4.0, 2.0]"


def test_proportion_by_hand() -> None:
    """8 of 10 have the logit ln 4 and the variance p (1 - p) / 9; single outcomes have (10 - 1)^2 / 2 = 40.5 df."""
    interval = proportion([1] * 8 + [0] * 2)
    reach = 2.020307 / np.sqrt(0.8 * 0.2 * 9)  # t_40.5
    ends = [1 / (1 + np.exp(-shift) / 4) for shift in (-reach, reach)]
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.8, *ends), abs=1e-5)
    assert proportion([0] * 10).high == pytest.approx(1 - 0.05**0.1)  # not zero


def test_proportion_of_groups() -> None:
    """Copies of an outcome add nothing, equal sums of groups do not make it certain, and one group says nothing."""
    outcomes = [1, 1, 1, 0, 1, 0, 0, 1]
    assert proportion(np.repeat(outcomes, 5), np.repeat(range(8), 5)).as_dict() == pytest.approx(
        proportion(outcomes).as_dict()
    )
    assert proportion([1, 0, 1, 0], [0, 0, 1, 1]).low < 0.2
    assert proportion([1, 0, 0.5], ["a"] * 3).as_dict() == {"estimate": 0.5, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize("outcomes", [[], [0.0, 1.5], [-1.0, 0.0]])
def test_proportion_refuses_outcomes(outcomes: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one, all in"):
        proportion(outcomes)


def test_ties_agree_to_rounding() -> None:
    assert ties([21.5, 21.5, 0.0, 1e-9], [21.50001, 21.6, 0.0, 0.0]).tolist() == [True, False, True, True]
    assert ties(1e-5, 0.0, scale=100.0) and not ties(1e-5, 0.0)
    assert outcomes([21.5, 21.6, 21.4], [21.50001, 21.5, 21.5]).tolist() == [0.5, 1, 0]


def test_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, 1, -1: mean 0.2, s^2 = 2.8 / 4, se = sqrt(0.7 / 5); t_4 = 2.776445."""
    interval = paired_difference([0, 0, 1, 0, 1], [1, 0, 1, 1, 0])
    assert interval.estimate == pytest.approx(0.2)
    assert interval.high == 1.0  # 0.2 + 1.04, but no outcome can change by more than 1
    assert 0.2 - interval.low == pytest.approx(2.776445 * np.sqrt(0.14), rel=1e-6)


def test_paired_difference_with_groups_by_hand() -> None:
    """Differences 1, 1 | 0 | 0, -1, so m = 0.2 and the groups' residual sums are 1.6, -0.2, -1.4.

    se^2 = 3/2 (2.56 + 0.04 + 1.96) / 25 = 0.2736; t_2 = 4.302653.
    """
    interval = paired_difference([0, 0, 9, 1, 1], [1, 1, 9, 1, 0], groups=["x", "x", "y", "z", "z"])
    assert interval.high - interval.estimate == pytest.approx(4.302653 * np.sqrt(0.2736))


def test_paired_difference_without_groups_is_students() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(20, 2, 30), rng.normal(21, 2, 30)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    interval = paired_difference(before, after)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_paired_difference_ignores_copies_in_a_group() -> None:
    """Every pair three times, grouped, is the same evidence as once: the same interval, not one narrower by sqrt(3)."""
    before, after = [0.0, 0.3, 0.5, 0.1], [0.4, 0.2, 0.9, 0.3]
    once = paired_difference(before, after)
    thrice = paired_difference(np.repeat(before, 3), np.repeat(after, 3), np.repeat(["a", "b", "c", "d"], 3).tolist())
    assert (thrice.estimate, thrice.low, thrice.high) == pytest.approx((once.estimate, once.low, once.high))
    ungrouped = paired_difference(np.repeat(before, 3), np.repeat(after, 3))
    assert ungrouped.high - ungrouped.low < 0.7 * (once.high - once.low)


def test_paired_difference_of_equal_changes() -> None:
    """By the rule of three: of 60 pairs without any change, up to 3 / 60 of all pairs may change after all."""
    interval = paired_difference(np.ones(60), np.ones(60))
    assert interval.estimate == 0.0
    assert interval.high == pytest.approx(1 - 0.05 ** (1 / 60)) == pytest.approx(3 / 60, rel=0.05)
    assert interval.low == -interval.high
    gained = paired_difference(np.zeros(20), np.ones(20))
    assert (gained.estimate, gained.high) == (1.0, 1.0)
    assert gained.low == pytest.approx(1 - 2 * (1 - 0.05 ** (1 / 20)))
    before = np.array([0.1, 0.2, 0.3, 0.7])
    assert paired_difference(before, before + 0.1).high > 0.5  # equal up to rounding


@pytest.mark.parametrize(("gain", "loss", "number"), [(0.12, 0.06, 100), (0.3, 0.1, 40), (0.01, 0.0, 60)])
def test_paired_difference_covers_outcomes(gain: float, loss: float, number: int) -> None:
    """Also for changes so rare that often none is seen."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        change = rng.choice([1, -1, 0], size=number, p=[gain, loss, 1 - gain - loss])
        interval = paired_difference(change == -1, change == 1)
        covered += interval.low <= gain - loss <= interval.high
    assert covered >= 925  # 950 expected; three standard deviations are 21


def test_paired_difference_covers_with_groups_only() -> None:
    """Four seeds of a prompt share its luck."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 4).tolist()
    covered = {"grouped": 0, "ungrouped": 0}
    for _ in range(400):
        difference = 0.2 + np.repeat(rng.normal(0, 1, 30), 4) + rng.normal(0, 0.5, 120)
        for name, keys in (("grouped", groups), ("ungrouped", None)):
            interval = paired_difference(np.zeros(120), difference, keys)
            covered[name] += interval.low <= 0.2 <= interval.high
    assert 365 <= covered["grouped"] <= 396
    assert covered["ungrouped"] < 320


@pytest.mark.parametrize(
    ("before", "after", "groups", "error"),
    [
        ([1.0], [0.0], None, "two groups"),
        ([1.0, 0.0], [0.0, 1.0], ["a", "a"], "2 rows in 1 groups"),
        ([1.0, 0.0], [0.0], None, "2 scores before but 1 after"),
        ([1.0, float("nan")], [0.0, 1.0], None, "before: score 1 of 2 is nan"),
        ([1.0, 2.0], [0.0, float("inf")], None, "after: score 1 of 2 is inf"),
        ([1.0, 2.0], [0.0, 1.0], ["a"], "1 groups for 2 rows"),
        ([[1.0, 2.0]], [[0.0, 1.0]], None, r"shape \[1, 2\]"),
    ],
)
def test_paired_difference_refuses(before: Any, after: Any, groups: list[str] | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        paired_difference(before, after, groups)


def rate(sums: np.ndarray) -> np.ndarray:
    """Return the ratio [1, ...] of two counts."""
    return np.stack([sums[..., 0] / np.maximum(sums[..., 1], 1e-9)])


def jackknife(*runs: Any, groups: Sequence[int] | None = None) -> Interval:
    (interval,) = cluster_jackknife(runs, rate, groups, bounds=[(0.0, 1.0)])
    return interval


def jackknife_pairs(before: Any, after: Any) -> Interval:
    counts = [np.concatenate([before, after], axis=-1)]
    (interval,) = cluster_jackknife(counts, paired(rate), bounds=[(-1.0, 1.0)])
    return interval


def test_jackknife_of_a_rate_by_hand() -> None:
    """Of the rows 0 of 1 and 1 of 3 the rate is 1/4, without one of them 1/3 or 0, and t_1 = 12.7062."""
    reach = 12.7062 * np.sqrt((1 / 12**2 + 1 / 4**2) / 2) / (1 / 4 * 3 / 4)
    interval = jackknife([[0, 1], [1, 3]])
    ends = [1 / (1 + 3 * np.exp(-shift)) for shift in (-reach, reach)]
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((1 / 4, *ends), abs=1e-5)


def test_jackknife_of_a_difference_by_hand() -> None:
    """Differences 1/2, 0, 1 of rates of equal rows: their mean and Student's error with t_2 = 4.302653."""
    before, after = [[0, 2], [1, 2], [0, 2]], [[1, 2], [1, 2], [2, 2]]
    interval = jackknife_pairs(before, after)
    reach = 4.302653 * np.sqrt(0.25 / 3)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.5, 0.5 - reach, 1.0), abs=1e-6)


def test_rate_at_its_bound_has_an_interval() -> None:
    """The only mention is invented; without its image the quotient is 0 / 0."""
    interval = jackknife([[1, 1], [0, 0], [0, 0]])
    assert (interval.estimate, interval.high) == (1, 1) and 0 < interval.low < 1


def test_jackknife_leaves_out_whole_groups() -> None:
    rng = np.random.default_rng(4)
    rows = np.stack([rng.integers(0, 3, 30), rng.integers(3, 6, 30)], axis=-1)
    thrice = jackknife(np.repeat(rows, 3, axis=0), groups=np.repeat(np.arange(30), 3).tolist())
    assert thrice == jackknife(rows * 3)
    ungrouped = jackknife(np.repeat(rows, 3, axis=0))
    assert ungrouped.high - ungrouped.low < 0.7 * (thrice.high - thrice.low)


def test_jackknife_of_swapped_sides_mirrors() -> None:
    rng = np.random.default_rng(5)
    before = np.stack([rng.integers(0, 3, 40), rng.integers(3, 6, 40)], axis=-1)
    after = np.stack([rng.integers(0, 2, 40), rng.integers(3, 6, 40)], axis=-1)
    forward, backward = jackknife_pairs(before, after), jackknife_pairs(after, before)
    assert (backward.estimate, backward.low, backward.high) == pytest.approx(
        (-forward.estimate, -forward.high, -forward.low)
    )


def test_jackknife_is_narrower_for_pairs() -> None:
    rng = np.random.default_rng(6)
    before = np.stack([rng.binomial(8, rng.beta(1, 1, 100)), np.full(100, 8)], axis=-1)
    after = before - np.stack([rng.random(100) < 0.2, np.zeros(100)], axis=-1) * (before[:, :1] > 0)
    matched, shuffled = (jackknife_pairs(before, other) for other in (after, rng.permutation(after)))
    assert matched.estimate == pytest.approx(shuffled.estimate)
    assert matched.high - matched.low < 0.3 * (shuffled.high - shuffled.low)


def test_jackknife_without_change_follows_the_rule_of_three() -> None:
    rows = np.ones((60, 2))
    assert jackknife_pairs(rows, rows) == paired_difference(np.ones(60), np.ones(60))
    interval = jackknife(rows * [0, 1])
    assert (interval.estimate, interval.low) == (0, 0)
    assert interval.high == pytest.approx(1 - 0.05 ** (1 / 60))
    assert jackknife(*[rows * [0, 1]] * 3) == interval  # three runs


@pytest.mark.parametrize(
    ("counts", "groups", "error"),
    [
        ([[1, 2]], None, "1 rows in 1 groups"),
        ([[1, 2], [1, 2]], [0, 0], "2 rows in 1 groups"),
        ([1, 2], None, r"shape \[1, 2\]"),
        ([[1, 2], [1, float("inf")]], None, "expected finite numbers"),
    ],
)
def test_jackknife_refuses(counts: Any, groups: list[int] | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        jackknife(counts, groups=groups)


def test_equal_runs_are_as_uncertain_as_their_rows() -> None:
    run = np.stack([np.random.default_rng(10).integers(0, 2, 400), np.ones(400)], axis=-1)
    assert jackknife(run, run, run).as_dict() == pytest.approx(jackknife(run).as_dict())


def test_different_runs_by_hand() -> None:
    """Rates 0.2, 0.3, 0.4, the same in every row: a logit's error sqrt(0.01 / 3) / 0.21, with t_2 = 4.302653."""
    interval = jackknife(*(np.tile([share, 1.0], (50, 1)) for share in (0.2, 0.3, 0.4)))
    reach = 4.302653 * (0.01 / 3) ** 0.5 / 0.21
    ends = [1 / (1 + 7 / 3 * np.exp(-shift)) for shift in (-reach, reach)]
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.3, *ends), abs=1e-6)


def test_noise_of_rows_is_not_a_difference_of_runs() -> None:
    """Rows without an effect of their own: the interval is about that of all rows together, not with t_2."""
    rng = np.random.default_rng(12)
    widths = []
    for _ in range(50):
        runs = [np.stack([rng.binomial(1, 0.4, 200), np.ones(200)], axis=-1) for _ in range(3)]
        together = jackknife(np.concatenate(runs))
        widths.append((jackknife(*runs).high - jackknife(*runs).low) / (together.high - together.low))
    assert np.median(widths) < 1.1


def test_jackknife_covers_over_runs_and_rows() -> None:
    """Rows with rates of their own and three runs with effects of their own."""
    rng = np.random.default_rng(11)
    covered, tries, rows = 0, 300, 120
    for _ in range(tries):
        rates = np.clip(rng.beta(4, 8, rows)[None] + rng.normal(0, 0.05, (3, 1)), 0, 1)
        interval = jackknife(*np.stack([rng.binomial(1, rates), np.ones((3, rows))], axis=-1))
        covered += interval.low <= 1 / 3 <= interval.high
    assert covered >= 277  # 285 expected and two standard deviations are 8: it must not promise too much


def test_holm_by_hand() -> None:
    """Of 0.04, 0.01 and 0.03 the smallest counts thrice, the next twice, and none less than one before it."""
    differences = [Interval(1, 0, 2, p) for p in (0.04, 0.01, 0.03)]
    assert [d.p_holm for d in correct(differences)] == pytest.approx([0.06, 0.03, 0.06])
    assert [d.is_certain for d in correct(differences)] == [False, True, False]


@pytest.mark.parametrize("num_runs", [1, 3])
def test_p_value_is_where_the_interval_ends_at_0(num_runs: int) -> None:
    """Shift a difference until the end of its 95 % interval is 0: p is then 5 %."""
    rng = np.random.default_rng(13)
    before, after = rng.normal(0, 1, (2, num_runs, 40))
    after += rng.normal(0, 0.5, (num_runs, 1))

    def difference(shift: float) -> Interval:
        counts = np.stack([before, np.ones_like(before), after + shift, np.ones_like(after)], axis=-1)
        (interval,) = cluster_jackknife(counts, paired(rate), bounds=[(-9.0, 9.0)])
        return interval

    assert difference(-difference(0).low).p == pytest.approx(0.05)
    assert difference(-difference(0).estimate).p == pytest.approx(1)


def test_changes_that_cancel_in_every_group_are_not_certain() -> None:
    interval = paired_difference([0, 1] * 6, [1, 0] * 6, np.repeat(range(6), 2).tolist())
    assert interval.low < -0.1 and interval.high > 0.1 and interval.p == 1


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_score_that_is_not_finite_has_no_outcome(score: float) -> None:
    """A comparison with NaN is false, which would count as a loss."""
    with pytest.raises(ValueError, match="outcomes: score 1 of 2 is"):
        outcomes([1.0, score], [0.0, 0.0])
