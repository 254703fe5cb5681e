"""Intervals: worked by hand, against scipy, and by the coverage they promise."""

import numpy as np
import pytest
from scipy import stats

from mmalign.evaluation.intervals import (
    Interval,
    bootstrap,
    mean_of_runs,
    paired_bootstrap,
    paired_difference,
    proportion,
)


def test_points_and_str() -> None:
    interval = Interval(0.0586, 0.0262, 0.0917)
    assert interval.points() == "+5.9 [2.6, 9.2]"
    assert interval.points(signed=False) == "5.9 [2.6, 9.2]"
    assert str(interval) == "0.0586 [0.0262, 0.0917]"
    assert Interval(-0.01, -0.04, 0.02).points() == "-1.0 [-4.0, 2.0]"


def test_wilson_by_hand() -> None:
    """For k of n and z = 1.96: centre (k + z^2 / 2) / (n + z^2), reach z sqrt(k (n - k) / n + z^2 / 4) / (n + z^2)."""
    k, n, z = 8, 10, 1.959964
    centre = (k + z * z / 2) / (n + z * z)
    reach = z * np.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    found = proportion(k, n)
    assert found.estimate == 0.8
    assert found.low == pytest.approx(centre - reach, abs=1e-6)
    assert found.high == pytest.approx(centre + reach, abs=1e-6)
    assert proportion(0, 10).high == pytest.approx(z * z / (10 + z * z), abs=1e-6)  # not zero


def test_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, 1, -1: mean 0.2, s^2 = 2.8 / 4, se = sqrt(0.7 / 5); t_4 = 2.776445."""
    found = paired_difference([0, 0, 1, 0, 1], [1, 0, 1, 1, 0])
    assert found.estimate == pytest.approx(0.2)
    assert found.high == 1.0  # 0.2 + 1.04, but no outcome can change by more than 1
    assert 0.2 - found.low == pytest.approx(2.776445 * np.sqrt(0.14), rel=1e-6)


def test_is_student_without_groups() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(20, 2, 30), rng.normal(21, 2, 30)
    theirs = stats.ttest_rel(after, before).confidence_interval(0.9)
    ours = paired_difference(before, after, level=0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_copies_in_a_group_add_nothing() -> None:
    """Every pair three times, grouped, is the same evidence as once: the same interval, not one narrower by sqrt(3)."""
    before, after = [0.0, 0.3, 0.5, 0.1], [0.4, 0.2, 0.9, 0.3]
    once = paired_difference(before, after)
    thrice = paired_difference(np.repeat(before, 3), np.repeat(after, 3), np.repeat(["a", "b", "c", "d"], 3).tolist())
    assert (thrice.estimate, thrice.low, thrice.high) == pytest.approx((once.estimate, once.low, once.high))
    careless = paired_difference(np.repeat(before, 3), np.repeat(after, 3))
    assert careless.high - careless.low < 0.7 * (once.high - once.low)


def test_groups_by_hand() -> None:
    """Differences 1, 1 | 0 | 0, -1, so m = 0.2 and the groups' residual sums are 1.6, -0.2, -1.4.

    se^2 = 3/2 (2.56 + 0.04 + 1.96) / 25 = 0.2736; t_2 = 4.302653.
    """
    found = paired_difference([0, 0, 1, 1, 1], [1, 1, 1, 1, 0], groups=["x", "x", "y", "z", "z"], level=0.5)
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.75, 2) * np.sqrt(0.2736))


def test_no_change_is_no_proof() -> None:
    """60 pairs without any change: by the rule of three, up to 3 / 60 of all pairs may change after all."""
    found = paired_difference(np.ones(60), np.ones(60))
    assert found.estimate == 0.0
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 60)) == pytest.approx(3 / 60, rel=0.05)
    assert found.low == -found.high


def test_all_gained_is_no_certainty() -> None:
    found = paired_difference(np.zeros(20), np.ones(20))
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 2 * (1 - 0.05 ** (1 / 20)))


def test_equal_change_up_to_rounding_is_equal_change() -> None:
    before = np.array([0.1, 0.2, 0.3, 0.7])
    assert paired_difference(before, before + 0.1).high > 0.5


@pytest.mark.parametrize(("gain", "loss", "number"), [(0.12, 0.06, 100), (0.3, 0.1, 40), (0.01, 0.0, 60)])
def test_coverage_of_outcomes(gain: float, loss: float, number: int) -> None:
    """Holds the truth about as often as it says, also where changes are so rare that often none is seen."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(1000):
        change = rng.choice([1, -1, 0], size=number, p=[gain, loss, 1 - gain - loss])
        found = paired_difference(change == -1, change == 1)
        held += found.low <= gain - loss <= found.high
    assert held >= 925  # 950 expected; three standard deviations are 21


def test_coverage_with_groups() -> None:
    """Four seeds of a prompt share its luck: only the grouped interval covers."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 4).tolist()
    grouped = careless = 0
    for _ in range(400):
        difference = 0.2 + np.repeat(rng.normal(0, 1, 30), 4) + rng.normal(0, 0.5, 120)
        found = paired_difference(np.zeros(120), difference, groups)
        grouped += found.low <= 0.2 <= found.high
        found = paired_difference(np.zeros(120), difference)
        careless += found.low <= 0.2 <= found.high
    assert 365 <= grouped <= 396
    assert careless < 320


@pytest.mark.parametrize(
    ("before", "after", "groups", "said"),
    [
        ([1.0], [0.0], None, "two groups"),
        ([1.0, 0.0], [0.0, 1.0], ["a", "a"], "2 pairs in 1 groups"),
        ([1.0, 0.0], [0.0], None, "2 scores before but 1 after"),
        ([1.0, float("nan")], [0.0, 1.0], None, "before: score 1 of 2 is nan"),
        ([1.0, 2.0], [0.0, float("inf")], None, "after: score 1 of 2 is inf"),
        ([1.0, 2.0], [0.0, 1.0], ["a"], "1 groups for 2 pairs"),
        ([[1.0, 2.0]], [[0.0, 1.0]], None, r"shape \[1, 2\]"),
    ],
)
def test_refuses(before: list[float], after: list[float], groups: list[str] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        paired_difference(before, after, groups)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_refuses_counts(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {total}"):
        proportion(successes, total)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_refuses_level(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference([0.0, 1.0], [1.0, 1.0], level=level)


def rate(sums: np.ndarray) -> np.ndarray:
    """[1, ...] the first of two counts, of the second."""
    return np.stack([sums[..., 0] / np.maximum(sums[..., 1], 1e-9)])


def test_bootstrap_by_hand() -> None:
    """Of two rows, 0 of 1 and 1 of 3, the drawn sets are (0, 0), (0, 1), (1, 0), (1, 1): rates 0, 1/4, 1/4, 1/3."""
    (found,) = bootstrap([[0, 1], [1, 3]], rate)
    assert (found.estimate, found.low, found.high) == pytest.approx((1 / 4, 0, 1 / 3))


def test_bootstrap_draws_groups_whole() -> None:
    rng = np.random.default_rng(4)
    rows = np.stack([rng.integers(0, 3, 30), rng.integers(3, 6, 30)], axis=-1)
    thrice = bootstrap(np.repeat(rows, 3, axis=0), rate, np.repeat(np.arange(30), 3).tolist())
    assert thrice == bootstrap(rows * 3, rate)
    careless = bootstrap(np.repeat(rows, 3, axis=0), rate)
    assert careless[0].high - careless[0].low < 0.7 * (thrice[0].high - thrice[0].low)


def test_bootstrap_of_sides_mirrors() -> None:
    rng = np.random.default_rng(5)
    before = np.stack([rng.integers(0, 3, 40), rng.integers(3, 6, 40)], axis=-1)
    after = np.stack([rng.integers(0, 2, 40), rng.integers(3, 6, 40)], axis=-1)
    (ours,), (theirs,) = paired_bootstrap(before, after, rate), paired_bootstrap(after, before, rate)
    assert (theirs.estimate, theirs.low, theirs.high) == pytest.approx((-ours.estimate, -ours.high, -ours.low))


def test_bootstrap_pairs() -> None:
    """Two sides that go together differ by less than two that do not, and only pairs show it."""
    rng = np.random.default_rng(6)
    before = np.stack([rng.binomial(8, rng.beta(1, 1, 100)), np.full(100, 8)], axis=-1)
    after = before - np.stack([rng.random(100) < 0.2, np.zeros(100)], axis=-1) * (before[:, :1] > 0)
    (together,), (apart,) = (paired_bootstrap(before, other, rate) for other in (after, rng.permutation(after)))
    assert together.estimate == pytest.approx(apart.estimate)
    assert together.high - together.low < 0.3 * (apart.high - apart.low)


def test_bootstrap_without_any_change() -> None:
    """60 pairs without any change: the rule of three, as `paired_difference` has it."""
    rows = np.ones((60, 2))
    assert paired_bootstrap(rows, rows, rate) == [paired_difference(np.ones(60), np.ones(60))]
    (none,) = bootstrap(rows * [0, 1], rate)
    assert (none.estimate, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.05 ** (1 / 60))


def test_coverage_of_the_bootstrap() -> None:
    """A share of mentions that come in descriptions, each with a share of its own: held about as often as it says."""
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        mentions = rng.poisson(4, 80)
        rows = np.stack([rng.binomial(mentions, rng.beta(1, 4, 80)), mentions], axis=-1)
        (found,) = bootstrap(rows, rate, resamples=400)
        held += found.low <= 0.2 <= found.high
    assert held >= 266  # 285 expected; a percentile bootstrap of 80 covers 1 to 2 % less, two standard deviations are 8


def test_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match="1 rows in 1 groups"):
        bootstrap([[1, 2]], rate)
    with pytest.raises(ValueError, match="2 rows in 1 groups"):
        bootstrap([[1, 2], [1, 2]], rate, ["a", "a"])
    with pytest.raises(ValueError, match=r"shape \[2\]"):
        bootstrap([1, 2], rate)
    with pytest.raises(ValueError, match=r"shape \[2, 2\] before but \[3, 2\] after"):
        paired_bootstrap(np.ones((2, 2)), np.ones((3, 2)), rate)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap([[1, 2], [1, 2]], rate, level=95)


# -------------------------------------------------------------------------------------------------------- runs and rows

SHARE = [(0.0, 1.0)]


def test_runs_that_agree_are_as_uncertain_as_their_rows() -> None:
    """Three equal runs: no variance between them, and the interval is Student's around the bootstrap's own spread."""
    rng = np.random.default_rng(10)
    run = np.stack([rng.integers(0, 2, 400), np.ones(400)], axis=-1)
    (alone,), (thrice,) = (mean_of_runs([run] * number, rate, bounds=SHARE) for number in (1, 3))
    assert alone == bootstrap(run, rate)[0]
    assert thrice.estimate == pytest.approx(alone.estimate)
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.05)  # 2,000 sets: quantiles wobble


def test_runs_that_differ_by_hand() -> None:
    """Rates 0.2, 0.3 and 0.4, the same in every row: 0.3 +- t sqrt(0.01 / 3), with the t of two degrees of freedom."""
    runs = [np.tile([share, 1.0], (50, 1)) for share in (0.2, 0.3, 0.4)]
    (found,) = mean_of_runs(runs, rate, bounds=SHARE)
    reach = 4.302653 * (0.01 / 3) ** 0.5
    assert (found.estimate, found.low, found.high) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach))
    (wide,) = mean_of_runs([np.tile([share, 1.0], (50, 1)) for share in (0.0, 0.5, 1.0)], rate, bounds=SHARE)
    assert (wide.low, wide.high) == (0, 1)  # 0.5 +- 1.24 reaches beyond what a share can be


def test_coverage_over_runs_and_rows() -> None:
    """Rows with rates of their own and three runs with effects of their own: held as often as it says."""
    rng = np.random.default_rng(11)
    held, tries, rows = 0, 300, 120
    for _ in range(tries):
        rates = np.clip(rng.beta(4, 8, rows)[None] + rng.normal(0, 0.05, (3, 1)), 0, 1)
        runs = np.stack([rng.binomial(1, rates), np.ones((3, rows))], axis=-1)
        (found,) = mean_of_runs(runs, rate, bounds=SHARE, resamples=300)
        held += found.low <= 1 / 3 <= found.high
    assert held >= 277  # 285 expected and two standard deviations are 8: it must not promise too much


def test_runs_that_never_differ_have_the_rule_of_three() -> None:
    nothing = np.stack([np.zeros(60), np.ones(60)], axis=-1)
    (found,) = mean_of_runs([nothing] * 3, rate, bounds=SHARE)
    assert found == bootstrap(nothing, rate)[0]
