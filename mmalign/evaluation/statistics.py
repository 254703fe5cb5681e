"""Confidence intervals (95 %) of proportions, paired differences, and measures computed from sums.

Shapes: N rows (responses, or image pairs of one prompt and seed), G groups of rows, R training runs, K counts, M
measures. Rows of a group depend on each other: all seeds of a prompt, all questions about an image. A group is one
observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95  # coverage
Values = NDArray[np.float64]
Measures = Callable[[Values], Values]  # from sums of counts [..., K] to measures [M, ...]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, in the unit of the measure (a ratio is in [0, 1])."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format in the unit of the measure, with three digits: `0.0586 [0.0262, 0.0917]`."""
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def points(self, signed: bool = True) -> str:
        """Format in percentage points with one decimal: `+5.9 [2.6, 9.2]`, or without the sign."""
        estimate, low, high = (100 * end for end in (self.estimate, self.low, self.high))
        return f"{estimate:{'+' if signed else ''}.1f} [{low:.1f}, {high:.1f}]"

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers by name, for JSON."""
        return asdict(self)


def proportion(successes: int, total: int) -> Interval:
    """Return the ratio of successes with Wilson's score interval (Wilson 1927).

    The interval stays in [0, 1] and never has width 0. Trials are taken as independent, so with several seeds of a
    prompt it is too narrow.

    Raises:
        ValueError: there is no trial, or the successes are not in [0, total].
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"proportion: got {successes} successes of {total}; expected at least one trial and successes among them"
        )
    ends = stats.binomtest(successes, total).proportion_ci(confidence_level=LEVEL, method="wilson")
    return Interval(successes / total, float(ends.low), float(ends.high))


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
    if np.ptp(difference) <= 1e-12 * span:  # equal up to rounding
        return _rule_of_three(mean, (-span, span), num_groups)
    # Cluster-robust standard error
    group_sums = np.bincount(labels, weights=difference - mean)
    error = float(np.sqrt(num_groups / (num_groups - 1) * (group_sums**2).sum())) / difference.size
    reach = float(stats.t.ppf((1 + LEVEL) / 2, num_groups - 1)) * error
    return Interval(mean, max(mean - reach, -span), min(mean + reach, span))


def cluster_bootstrap(
    counts: ArrayLike,
    measures: Measures,
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: Sequence[tuple[float, float]],
    resamples: int = 2000,
) -> list[Interval]:
    r"""Return the mean of each measure over R training runs, with an interval over rows and runs.

    Groups are drawn with replacement, the same ones for all runs. The measures are computed from the sums of every
    sample (`scipy.stats.bootstrap`; Efron 1979; Efron and Tibshirani 1993, chapter 13). The seed is fixed, so repeated
    calls agree. A single run has the percentile interval. With the measure m_r of run r and the mean m over R > 1 runs,

        v_rows = variance of m over the samples,      v_runs = sum_r (m_r - m)^2 / (R (R - 1)),
        m +- t_df * sqrt(v_rows + v_runs),   df = (v_rows + v_runs)^2 / (v_rows^2 / (G - 1) + v_runs^2 / (R - 1)).

    The two variances estimate the effect of other rows and of other seeds. Both include the interaction of runs and
    rows, so the interval is a little too wide. df is Satterthwaite's (1946): if three seeds differ much, t has about
    two degrees of freedom and is 4.3. If a measure is equal in all samples and runs, its interval follows the rule of
    three (`_rule_of_three`).

    Args:
        counts: [R, N, K] the counts of each row of each run.
        measures: a function from sums [..., K] to measures [M, ...].
        groups: [N] a key that dependent rows share, such as the image; each row its own group by default.
        bounds: [M] the smallest and largest value that each measure can have.
        resamples: number of samples.

    Raises:
        ValueError: there are fewer than two groups, or a count is not finite.
    """
    runs = np.asarray(counts, dtype=np.float64)
    if runs.ndim != 3 or not np.isfinite(runs).all():
        raise ValueError(f"bootstrap: counts of shape {list(runs.shape)}; expected finite numbers [runs, rows, counts]")
    # Sums of the counts of each group [G, R K]
    num_runs, num_rows, num_counts = runs.shape
    labels, num_groups = _number_groups("bootstrap", groups, num_rows)
    rows = runs.transpose(1, 0, 2).reshape(num_rows, num_runs * num_counts)
    group_sums = np.zeros((num_groups, rows.shape[1]))
    np.add.at(group_sums, labels, rows)

    def measure_runs(sums: Values) -> Values:
        return np.stack([measures(run_sums) for run_sums in np.split(sums, num_runs, axis=-1)])

    # Variances over samples and over runs
    samples = _resample(group_sums, lambda sums: measure_runs(sums).mean(0), resamples)
    estimates = measure_runs(group_sums.sum(0)).mean(0).tolist()
    row_variances = samples.var(-1, ddof=1)
    run_variances = measure_runs(rows.sum(0)).var(0, ddof=1) / num_runs if num_runs > 1 else np.zeros(len(samples))
    # An interval for each measure
    intervals = []
    for estimate, sample, v_rows, v_runs, ends in zip(
        estimates, samples, row_variances, run_variances, bounds, strict=True
    ):
        if np.ptp(sample) <= 1e-12 and v_runs <= 1e-24:
            intervals.append(_rule_of_three(estimate, ends, num_groups))
            continue
        if num_runs == 1:
            low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        else:
            df = (v_rows + v_runs) ** 2 / (v_rows**2 / (num_groups - 1) + v_runs**2 / (num_runs - 1))
            reach = float(stats.t.ppf((1 + LEVEL) / 2, df)) * math.sqrt(v_rows + v_runs)
            low, high = max(ends[0], estimate - reach), min(ends[1], estimate + reach)
        intervals.append(Interval(estimate, float(low), float(high)))
    return intervals


def paired(measures: Measures) -> Measures:
    """Return a function of sums before and after side by side [..., 2 K]: the measures' differences."""

    def difference(sums: Values) -> Values:
        before, after = np.split(sums, 2, axis=-1)
        return measures(after) - measures(before)

    return difference


def _resample(group_sums: Values, measures: Measures, resamples: int) -> Values:
    """Return the measures of samples of groups drawn with replacement, [M, resamples]."""
    num_groups = len(group_sums)

    def statistic(indices: NDArray[np.intp], axis: int) -> Values:
        samples = indices.reshape(-1, num_groups)
        offsets = num_groups * np.arange(len(samples))[:, None]
        times_drawn = np.bincount((samples + offsets).ravel(), minlength=samples.size).reshape(samples.shape)
        return measures(times_drawn @ group_sums)

    result = stats.bootstrap(
        (np.arange(num_groups),),
        statistic,
        n_resamples=resamples,
        batch=max(1, (1 << 22) // num_groups),  # 2^22 indices take a few dozen megabytes
        vectorized=True,
        axis=-1,
        method="percentile",
        random_state=np.random.default_rng(0),  # `rng` only since scipy 1.15
    )
    samples: Values = result.bootstrap_distribution
    return samples


def _rule_of_three(estimate: float, bounds: tuple[float, float], num_groups: int) -> Interval:
    """Return the interval of a measure with the same value in every group.

    If none of 20 pairs changed, others still might. At most a share q = 1 - (1 - level)^(1/G) of all groups (about
    3 / G at 95 %) can have another value, within the bounds. The ends are (1 - q) * estimate + q * bound.
    """
    share = 1 - (1 - LEVEL) ** (1 / num_groups)
    low, high = ((1 - share) * estimate + share * bound for bound in bounds)
    return Interval(estimate, low, high)


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
