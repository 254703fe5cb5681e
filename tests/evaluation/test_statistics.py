"""Intervals: worked by hand, against scipy, and by the coverage they promise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmalign.evaluation.statistics import Interval, cluster_bootstrap, paired, paired_difference, proportion


def test_interval_formats() -> None:
    interval = Interval(0.0586, 0.0262, 0.0917)
    assert interval.points() == "+5.9 [2.6, 9.2]"
    assert interval.points(signed=False) == "5.9 [2.6, 9.2]"
    assert str(interval) == "0.0586 [0.0262, 0.0917]"
    assert Interval(-0.01, -0.04, 0.02).points() == "-1.0 [-4.0, 2.0]"


def test_proportion_is_wilsons_by_hand() -> None:
    """For k of n and z = 1.96: centre (k + z^2 / 2) / (n + z^2), reach z sqrt(k (n - k) / n + z^2 / 4) / (n + z^2)."""
    k, n, z = 8, 10, 1.959964
    centre = (k + z * z / 2) / (n + z * z)
    reach = z * np.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    interval = proportion(k, n)
    assert interval.estimate == 0.8
    assert (interval.low, interval.high) == pytest.approx((centre - reach, centre + reach), abs=1e-6)
    assert proportion(0, 10).high == pytest.approx(z * z / (10 + z * z), abs=1e-6)  # not zero


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_proportion_refuses_counts(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {total}"):
        proportion(successes, total)


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


def bootstrap(*runs: Any, groups: Sequence[int] | None = None, resamples: int = 2000) -> Interval:
    (interval,) = cluster_bootstrap(runs, rate, groups, bounds=[(0.0, 1.0)], resamples=resamples)
    return interval


def bootstrap_pairs(before: Any, after: Any) -> Interval:
    counts = [np.concatenate([before, after], axis=-1)]
    (interval,) = cluster_bootstrap(counts, paired(rate), bounds=[(-1.0, 1.0)])
    return interval


def test_bootstrap_by_hand() -> None:
    """Of two rows, 0 of 1 and 1 of 3, the samples are (0, 0), (0, 1), (1, 0), (1, 1): rates 0, 1/4, 1/4, 1/3."""
    interval = bootstrap([[0, 1], [1, 3]])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((1 / 4, 0, 1 / 3))


def test_bootstrap_draws_whole_groups() -> None:
    rng = np.random.default_rng(4)
    rows = np.stack([rng.integers(0, 3, 30), rng.integers(3, 6, 30)], axis=-1)
    thrice = bootstrap(np.repeat(rows, 3, axis=0), groups=np.repeat(np.arange(30), 3).tolist())
    assert thrice == bootstrap(rows * 3)
    ungrouped = bootstrap(np.repeat(rows, 3, axis=0))
    assert ungrouped.high - ungrouped.low < 0.7 * (thrice.high - thrice.low)


def test_bootstrap_of_swapped_sides_mirrors() -> None:
    rng = np.random.default_rng(5)
    before = np.stack([rng.integers(0, 3, 40), rng.integers(3, 6, 40)], axis=-1)
    after = np.stack([rng.integers(0, 2, 40), rng.integers(3, 6, 40)], axis=-1)
    forward, backward = bootstrap_pairs(before, after), bootstrap_pairs(after, before)
    assert (backward.estimate, backward.low, backward.high) == pytest.approx(
        (-forward.estimate, -forward.high, -forward.low)
    )


def test_bootstrap_is_narrower_for_pairs() -> None:
    rng = np.random.default_rng(6)
    before = np.stack([rng.binomial(8, rng.beta(1, 1, 100)), np.full(100, 8)], axis=-1)
    after = before - np.stack([rng.random(100) < 0.2, np.zeros(100)], axis=-1) * (before[:, :1] > 0)
    matched, shuffled = (bootstrap_pairs(before, other) for other in (after, rng.permutation(after)))
    assert matched.estimate == pytest.approx(shuffled.estimate)
    assert matched.high - matched.low < 0.3 * (shuffled.high - shuffled.low)


def test_bootstrap_without_change_follows_the_rule_of_three() -> None:
    rows = np.ones((60, 2))
    assert bootstrap_pairs(rows, rows) == paired_difference(np.ones(60), np.ones(60))
    interval = bootstrap(rows * [0, 1])
    assert (interval.estimate, interval.low) == (0, 0)
    assert interval.high == pytest.approx(1 - 0.05 ** (1 / 60))
    assert bootstrap(*[rows * [0, 1]] * 3) == interval  # three runs


def test_bootstrap_covers() -> None:
    """A ratio of mentions that come in descriptions, each with a rate of its own."""
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(300):
        mentions = rng.poisson(4, 80)
        rows = np.stack([rng.binomial(mentions, rng.beta(1, 4, 80)), mentions], axis=-1)
        interval = bootstrap(rows, resamples=400)
        covered += interval.low <= 0.2 <= interval.high
    assert (
        covered >= 266
    )  # 285 expected; a percentile bootstrap of 80 covers 1 to 2 % less, two standard deviations are 8


@pytest.mark.parametrize(
    ("counts", "groups", "error"),
    [
        ([[1, 2]], None, "1 rows in 1 groups"),
        ([[1, 2], [1, 2]], [0, 0], "2 rows in 1 groups"),
        ([1, 2], None, r"shape \[1, 2\]"),
        ([[1, 2], [1, float("inf")]], None, "expected finite numbers"),
    ],
)
def test_bootstrap_refuses(counts: Any, groups: list[int] | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        bootstrap(counts, groups=groups)


def test_equal_runs_are_as_uncertain_as_their_rows() -> None:
    """Three equal runs: no variance between them, and the interval is Student's around the bootstrap's own spread."""
    rng = np.random.default_rng(10)
    run = np.stack([rng.integers(0, 2, 400), np.ones(400)], axis=-1)
    single, triple = bootstrap(run), bootstrap(run, run, run)
    assert triple.estimate == pytest.approx(single.estimate)
    assert triple.high - triple.low == pytest.approx(
        single.high - single.low, rel=0.05
    )  # 2,000 samples: quantiles wobble


def test_different_runs_by_hand() -> None:
    """Rates 0.2, 0.3 and 0.4, the same in every row: 0.3 +- t sqrt(0.01 / 3), with the t of two degrees of freedom."""
    interval = bootstrap(*(np.tile([share, 1.0], (50, 1)) for share in (0.2, 0.3, 0.4)))
    reach = 4.302653 * (0.01 / 3) ** 0.5
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach))
    wide = bootstrap(*(np.tile([share, 1.0], (50, 1)) for share in (0.0, 0.5, 1.0)))
    assert (wide.low, wide.high) == (0, 1)  # 0.5 +- 1.24 reaches beyond the bounds


@pytest.mark.slow
def test_bootstrap_covers_over_runs_and_rows() -> None:
    """Rows with rates of their own and three runs with effects of their own."""
    rng = np.random.default_rng(11)
    covered, tries, rows = 0, 300, 120
    for _ in range(tries):
        rates = np.clip(rng.beta(4, 8, rows)[None] + rng.normal(0, 0.05, (3, 1)), 0, 1)
        interval = bootstrap(*np.stack([rng.binomial(1, rates), np.ones((3, rows))], axis=-1), resamples=300)
        covered += interval.low <= 1 / 3 <= interval.high
    assert covered >= 277  # 285 expected and two standard deviations are 8: it must not promise too much
