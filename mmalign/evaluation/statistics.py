"""Confidence intervals (95 %) of proportions, paired differences, and measures computed from sums.

Shapes: N rows (responses, or image pairs of one prompt and seed), G groups of rows, R training runs, K counts, M
measures. Rows of a group depend on each other: all seeds of a prompt, all questions about an image. A group is one
observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

LEVEL = 0.95  # coverage
RATE = (0.0, 1.0)  # the bounds of a rate
Values = NDArray[np.float64]
Measures = Callable[[Values], Values]  # from sums of counts [..., K] to measures [M, ...]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, in the unit of the measure (a ratio is in [0, 1]).

    A difference also has the two-sided p-value of no difference, and `correct` adds the one corrected by Holm.
    """

    estimate: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None

    def __str__(self) -> str:
        """Format in the unit of the measure, with three digits: `0.0586 [0.0262, 0.0917]`."""
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def points(self, signed: bool = True) -> str:
        """Format in percentage points with one decimal: `+5.9 [2.6, 9.2]`, or without the sign."""
        estimate, low, high = (100 * end for end in (self.estimate, self.low, self.high))
        return f"{estimate:{'+' if signed else ''}.1f} [{low:.1f}, {high:.1f}]"

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by name, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_certain(self) -> bool:
        """True if the difference from 0 survives Holm's correction at 5 %."""
        return self.p_holm is not None and self.p_holm <= 1 - LEVEL


def correct(differences: Sequence[Interval]) -> list[Interval]:
    """Return differences with p-values corrected for their number, by Holm's step-down method (1979).

    At most 5 % of such families have any false difference with `p_holm` up to 0.05. The intervals are unchanged.
    """
    p_values = [difference.p for difference in differences]
    assert None not in p_values, "only differences have p-values"
    order = np.argsort(np.array(p_values, dtype=np.float64), kind="stable")
    corrected, largest = list(differences), 0.0
    for rank, index in enumerate(order.tolist()):
        difference = differences[index]
        assert difference.p is not None
        # Step-down: never below the value of a smaller p
        largest = max(largest, min(1.0, (len(differences) - rank) * difference.p))
        corrected[index] = replace(difference, p_holm=largest)
    return corrected


def ties(first: ArrayLike, second: ArrayLike, scale: ArrayLike = 0.0) -> NDArray[np.bool_]:
    """Return where two scores tie: they agree to within float32 rounding, 1e-6 of the largest size.

    Scores of equal images or texts differ by as much from batch to batch. If the scores are differences of larger
    numbers, `scale` is the size of those. Differences below 1e-8 always tie.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = np.maximum(np.maximum(abs(a), abs(b)), scale)
    within: NDArray[np.bool_] = abs(a - b) <= np.maximum(1e-6 * size, 1e-8)
    return within


def outcomes(scores: ArrayLike, others: ArrayLike, scale: ArrayLike = 0.0) -> Values:
    """Return 1 where the first score is higher, 0 where it is lower, and 0.5 where both tie as in `ties`.

    Raises:
        ValueError: a score is not finite.
    """
    for values in (scores, others):
        _scores("outcomes", np.atleast_1d(values))
    return np.where(ties(scores, others, scale), 0.5, np.greater(scores, others))


def proportion(outcomes: ArrayLike, groups: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of N outcomes in [0, 1], with the interval of a rate (`cluster_jackknife`).

    A single group has the interval [0, 1].

    Args:
        outcomes: [N] 1 for a success, 0 for a failure, 0.5 for a tie.
        groups: [N] a key that dependent outcomes share, such as the prompt; each its own group by default.

    Raises:
        ValueError: there is no outcome, one is not in [0, 1], or the lengths differ.
    """
    values = _scores("proportion", outcomes)
    if not values.size or values.min() < 0 or values.max() > 1:
        raise ValueError(f"proportion: {values.size} outcomes; expected at least one, all in [0, 1]")
    if len(set(range(values.size) if groups is None else groups)) == 1:
        return Interval(float(values.mean()), 0.0, 1.0)
    counts = np.stack([values, np.ones(values.size)], axis=-1)
    (interval,) = cluster_jackknife([counts], lambda sums: sums[None, ..., 0] / sums[..., 1], groups, bounds=[RATE])
    return interval


def paired_difference(before: ArrayLike, after: ArrayLike, groups: Sequence[Hashable] | None = None) -> Interval:
    r"""Return the mean of `after - before` over pairs, with a cluster-robust interval.

    With the N differences d_i, their mean m, and G groups g (each pair its own group by default),

        se^2 = G / (G - 1) * sum_g (sum_{i in g} (d_i - m))^2 / N^2,      m +- t_{G-1} * se.

    This is the cluster-robust error of a mean, with the finite-sample factor and the degrees of freedom of Cameron and
    Miller, "A Practitioner's Guide to Cluster-Robust Inference" (2015), sections II and VI. Miller, "Adding Error Bars
    to Evals" (2024), uses it for evaluations of models. Without groups it is Student's paired interval.

    If all pairs differ by the same amount, se is 0, and the interval follows the rule of three (`_rule_of_three`).
    Pairs differ by at most S = max(1, range of the scores), so intervals are cut to [-S, S].

    Args:
        before: [N] scores, or outcomes 0 and 1.
        after: [N] scores of the other side, in the same order.
        groups: [N] a key that dependent pairs share, such as the prompt.

    Raises:
        ValueError: the lengths differ, a score is not finite, or there are fewer than two groups.
    """
    first, second = _scores("before", before), _scores("after", after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_difference: {first.size} scores before but {second.size} after; expected one pair each"
        )
    difference = second - first
    labels, num_groups = _number_groups("paired_difference", groups, difference.size)
    mean, span = float(difference.mean()), max(1.0, float(np.ptp([first, second])))
    # Cluster-robust variance; changes that are equal, or cancel in every group, have none
    group_sums = np.bincount(labels, weights=difference - mean)
    variance = num_groups / (num_groups - 1) * float((group_sums**2).sum()) / difference.size**2
    if variance <= (1e-12 * span) ** 2:
        return _rule_of_three(mean, (-span, span), num_groups)
    return _interval(mean, Spread(variance, num_groups - 1), (-span, span))


def cluster_jackknife(
    counts: ArrayLike,
    measures: Measures,
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: Sequence[tuple[float, float]],
) -> list[Interval]:
    r"""Return the mean of each measure over R training runs, with an interval over rows and runs.

    The jackknife (Efron and Tibshirani 1993, chapter 11) leaves out one of G groups at a time, in all runs. With the
    measure m_r of run r, the mean m over runs, and a left-out group in parentheses,

        v_rows  = (G - 1) / G * sum_g (m_(g) - m)^2,
        v_runs  = sum_r (m_r - m)^2 / (R (R - 1)),
        v_noise = sum_r (G - 1) / G * sum_g ((m_r - m)_(g) - (m_r - m))^2 / (R (R - 1)),
        v_seeds = max(0, v_runs - v_noise),
        reach^2 = t_df^2 v_rows + t_{R-1}^2 v_seeds.

    v_noise is the part of v_runs that stems from the rows, and is in v_rows already. Each variance has the quantile of
    its own degrees of freedom (Cochran 1964). A rate, with bounds 0 and 1, has the interval of its logit, and the df
    of `_rate_df`. Other measures have m +- reach, cut to their bounds, and df = G - 1. If a measure is equal in all
    groups and runs, its interval follows the rule of three (`_rule_of_three`). docs/statistics.md has the coverage.

    Args:
        counts: [R, N, K] the counts of each row of each run.
        measures: a function from sums [..., K] to measures [M, ...].
        groups: [N] a key that dependent rows share, such as the image; each row its own group by default.
        bounds: [M] the smallest and largest value that each measure can have.

    Raises:
        ValueError: there are fewer than two groups, or a count is not finite.
    """
    runs = np.asarray(counts, dtype=np.float64)
    if runs.ndim != 3 or not np.isfinite(runs).all():
        raise ValueError(f"jackknife: counts of shape {list(runs.shape)}; expected finite numbers [runs, rows, counts]")
    num_runs, num_rows, _ = runs.shape
    labels, num_groups = _number_groups("jackknife", groups, num_rows)
    by_run, deviations = _leave_groups_out(runs, measures, labels, num_groups)
    # Variances over rows and over runs [M]
    scale, pairs_of_runs = (num_groups - 1) / num_groups, max(1, num_runs * (num_runs - 1))
    means, row_deviations = by_run.mean(1), deviations.mean(1)
    v_rows = scale * np.square(row_deviations).sum(-1)
    v_runs = np.square(by_run - means[:, None]).sum(-1) / pairs_of_runs
    v_noise = scale * np.square(deviations - row_deviations[:, None]).sum((1, 2)) / pairs_of_runs
    v_seeds = np.maximum(0, v_runs - v_noise)
    # An interval for each measure
    intervals = []
    for mean, rows, seeds, groups_moved, ends in zip(
        means.tolist(), v_rows.tolist(), v_seeds.tolist(), row_deviations, bounds, strict=True
    ):
        if mean in ends or max(rows, seeds) <= 1e-24:  # at a bound, only a quotient 0 / 0 moves a measure
            intervals.append(_rule_of_three(mean, ends, num_groups))
            continue
        df = _rate_df(groups_moved) if ends == RATE else num_groups - 1
        intervals.append(_interval(mean, Spread(rows, df, seeds, num_runs - 1), ends))
    return intervals


def _leave_groups_out(
    runs: Values, measures: Measures, labels: NDArray[np.intp], num_groups: int
) -> tuple[Values, Values]:
    """Return the measures [M, R] of all rows, and their deviations without each group [M, R, G]."""
    # Sums of each group in each run [G, R, K]
    group_sums = np.zeros((num_groups, runs.shape[0], runs.shape[2]))
    np.add.at(group_sums, labels, runs.swapaxes(0, 1))
    sums = runs.sum(1)
    by_run = measures(sums)
    # Sums of all rows less those of one group
    return by_run, measures(sums[:, None] - group_sums.swapaxes(0, 1)) - by_run[..., None]


def paired(measures: Measures) -> Measures:
    """Return a function of sums before and after side by side [..., 2 K]: the measures' differences."""

    def difference(sums: Values) -> Values:
        before, after = np.split(sums, 2, axis=-1)
        return measures(after) - measures(before)

    return difference


class Spread(NamedTuple):
    """Variances of an estimate over rows and over seeds, with their degrees of freedom."""

    v_rows: float
    df_rows: float
    v_seeds: float = 0.0
    df_seeds: int = 0

    def reach(self, level: float) -> float:
        """Return half the width of the interval of this coverage."""
        square: float = special.stdtrit(self.df_rows, (1 + level) / 2) ** 2 * self.v_rows
        if self.v_seeds:
            square += special.stdtrit(self.df_seeds, (1 + level) / 2) ** 2 * self.v_seeds
        return math.sqrt(square)

    def p_value(self, estimate: float) -> float:
        """Return the p-value at which the interval of coverage 1 - p ends at 0."""
        if not self.v_seeds:
            return 2 * float(special.stdtr(self.df_rows, -abs(estimate) / math.sqrt(self.v_rows)))
        # The reach grows with the coverage: p is where it equals the estimate
        least, most = 1e-12, 1 - 1e-12
        if self.reach(1 - most) >= abs(estimate):
            return 1.0
        if self.reach(1 - least) <= abs(estimate):
            return least
        return float(optimize.brentq(lambda p: self.reach(1 - p) - abs(estimate), least, most))


def _interval(estimate: float, spread: Spread, bounds: tuple[float, float]) -> Interval:
    """Return the interval of a rate's logit, or estimate +- reach, cut to the bounds."""
    reach = spread.reach(LEVEL)
    if bounds == RATE:
        # By the delta method: the logit's derivative is 1 / (p (1 - p))
        logit, half_width = special.logit(estimate), reach / (estimate * (1 - estimate))
        return Interval(estimate, float(special.expit(logit - half_width)), float(special.expit(logit + half_width)))
    p_value = spread.p_value(estimate)
    return Interval(estimate, max(bounds[0], estimate - reach), min(bounds[1], estimate + reach), p_value)


def _rate_df(deviations: Values) -> float:
    """Return Satterthwaite's (1946) degrees of freedom of a rate's variance, from the groups' deviations u [G].

    df = 2 v^2 / var(v) with v = sum u^2. As with single outcomes, the rate itself explains a part of the variance's
    variation, which the logit accounts for. So var(v) is that of the residuals of u^2 after regression on u. A normal u
    has df = G, and a binary u has no residuals. df is at most (G - 1)^2 / 2, since few groups can agree by chance.
    """
    num_groups, most = len(deviations), max(1.0, (len(deviations) - 1) ** 2 / 2)
    centered = deviations - deviations.mean()
    total = float(np.square(centered).sum())
    if num_groups == 2 or total <= 1e-24:
        return most
    squares = np.square(centered) - total / num_groups
    residuals = squares - centered * (squares @ centered) / total
    variation = num_groups * float(np.square(residuals).sum())
    square = 2 * total**2 * (num_groups - 2)
    return max(1.0, square / variation) if square < most * variation else most


def _rule_of_three(estimate: float, bounds: tuple[float, float], num_groups: int) -> Interval:
    """Return the interval of a measure with the same value in every group.

    If none of 20 pairs changed, others still might. At most a share q = 1 - (1 - level)^(1/G) of all groups (about
    3 / G at 95 %) can have another value, within the bounds. The ends are (1 - q) * estimate + q * bound.
    """
    share = 1 - (1 - LEVEL) ** (1 / num_groups)
    low, high = ((1 - share) * estimate + share * bound for bound in bounds)
    is_difference = bounds[0] < 0 < bounds[1]
    p_value = (bounds[1] / (bounds[1] + abs(estimate))) ** num_groups if is_difference else None
    return Interval(estimate, low, high, p_value)


def _number_groups(name: str, groups: Sequence[Hashable] | None, num_rows: int) -> tuple[NDArray[np.intp], int]:
    """Return the group number of each row [N], in order of appearance, and the number of groups, at least two."""
    keys = range(num_rows) if groups is None else groups
    if len(keys) != num_rows:
        raise ValueError(f"{name}: {len(keys)} groups for {num_rows} rows; expected the group of each row")
    numbers: dict[Hashable, int] = {}
    labels = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
    if len(numbers) < 2:
        raise ValueError(
            f"{name}: {num_rows} rows in {len(numbers)} groups; an interval needs two groups, so measure more"
        )
    return labels, len(numbers)


def _scores(name: str, values: ArrayLike) -> Values:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name}: scores of shape {list(scores.shape)}; expected one number per image, [N]")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(f"{name}: score {bad[0]} of {scores.size} is {scores[bad[0]]}; expected finite numbers only")
    return scores
