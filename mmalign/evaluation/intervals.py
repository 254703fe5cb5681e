"""Intervals: how far a measured share, or a measured difference, can be trusted.

N is the number of pairs (one image before, one after, of the same prompt and seed), G the number of groups: the seeds
of one prompt are alike, so they count as one group and not as so many independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate and the two ends of its interval, in the unit of what was measured (a share is in [0, 1])."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """In the unit of what was measured, three digits: `0.0586 [0.0262, 0.0917]`."""
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def points(self, signed: bool = True) -> str:
        """In percentage points with one decimal: `+5.9 [2.6, 9.2]`, or `33.2 [27.7, 39.2]` where not `signed`."""
        estimate, low, high = (100 * x for x in (self.estimate, self.low, self.high))
        return f"{estimate:{'+' if signed else ''}.1f} [{low:.1f}, {high:.1f}]"

    def as_dict(self) -> dict[str, float]:
        """The three numbers by name, for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def proportion(successes: int, total: int, level: float = 0.95) -> Interval:
    """The share of successes with Wilson's score interval (Wilson 1927), which stays in [0, 1] and never has width 0.

    Trials are taken as independent: with several seeds of one prompt it is somewhat too narrow.

    Raises:
        ValueError: no trial, a count outside [0, total], or a level outside (0, 1).
    """
    _check_level(level)
    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"proportion: got {successes} successes of {total}; expected at least one trial and successes among them"
        )
    found = stats.binomtest(successes, total).proportion_ci(confidence_level=level, method="wilson")
    return Interval(successes / total, float(found.low), float(found.high))


def paired_difference(
    before: ArrayLike, after: ArrayLike, groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> Interval:
    r"""The mean of `after - before` over pairs, with an interval that is robust to groups of dependent pairs.

    With d_i the N differences, m their mean, and G groups g (each pair its own group where none are given),

        se^2 = G / (G - 1) * sum_g (sum_{i in g} (d_i - m))^2 / N^2,      m +- t_{G-1} * se.

    That is the cluster-robust error of a mean with the finite-sample factor and the degrees of freedom of Cameron and
    Miller, "A Practitioner's Guide to Cluster-Robust Inference" (2015), sections II and VI; used for evaluations of
    models by Miller, "Adding Error Bars to Evals" (2024). Without groups it is Student's paired interval.

    Where all pairs differ by the same c, se is 0 and says nothing: 20 pairs of which none changed do not prove that
    none ever would. Then at most a share q = 1 - (1 - level)^(1/G) of all groups (about 3 / G at 95 %, the rule of
    three) can be other than c, each by no more than a pair can differ at all, S = max(1, range of the scores):
    [(1 - q) c - q S, (1 - q) c + q S]. No interval reaches beyond [-S, S].

    Args:
        before: [N] scores, or outcomes 0 and 1.
        after: [N] the same of the other side, in the same order.
        groups: [N] what dependent pairs share, such as the prompt.
        level: the coverage.

    Raises:
        ValueError: lengths differ, a score is not finite, or there are fewer than two pairs or groups.
    """
    _check_level(level)
    first, second = _scores("before", before), _scores("after", after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_difference: {first.size} scores before but {second.size} after; expected one pair each"
        )
    difference = second - first
    labels = _group_numbers(groups, difference.size)
    num_groups = int(labels.max(initial=-1)) + 1
    if num_groups < 2:
        raise ValueError(
            f"paired_difference: {difference.size} pairs in {num_groups} groups; an interval needs two groups, "
            "so measure more prompts"
        )
    mean = float(difference.mean())
    span = max(1.0, float(np.ptp([first, second])))
    sums = np.bincount(labels, weights=difference - mean)
    error = float(np.sqrt(num_groups / (num_groups - 1) * (sums**2).sum())) / difference.size
    if np.ptp(difference) <= 1e-12 * span:
        other = 1 - (1 - level) ** (1 / num_groups)
        low, high = (1 - other) * mean - other * span, (1 - other) * mean + other * span
    else:
        reach = float(stats.t.ppf((1 + level) / 2, num_groups - 1)) * error
        low, high = mean - reach, mean + reach
    return Interval(mean, max(low, -span), min(high, span))


def bootstrap(
    counts: ArrayLike,
    measures: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    r"""Intervals of measures that are no means but functions of sums: shares of mentions, F1, micro-averaged recall.

    Percentile bootstrap (Efron 1979; Efron and Tibshirani 1993, chapter 13) by `scipy.stats.bootstrap`: groups are
    drawn with replacement, each with all of its rows, and the measures computed from the sums of every drawn set.
    The same seed draws the same sets, so the ends do not move from call to call.

    A measure that is the same in every drawn set, such as 0 mentions of invented objects, gets the interval that
    `paired_difference` gives there, by the rule of three: up to a share q = 1 - (1 - level)^(1/G) of all groups may be
    otherwise, as far as the bounds allow.

    Args:
        counts: [N, K] what was counted in each row.
        measures: from sums [..., K] to the values of M measures, [M, ...].
        groups: [N] what dependent rows share, such as the image.
        bounds: the least and the greatest that a measure can be.
        level: the coverage.
        resamples: how many sets are drawn.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than two rows or groups, or a count is not finite.
    """
    _check_level(level)
    estimates, values, num_groups = _resampled(counts, measures, groups, resamples, seed)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    certain = [_certain(float(estimate), bounds, num_groups, level) for estimate in estimates]
    return [
        certain[at] if np.ptp(values[at]) <= 1e-12 else Interval(float(estimate), float(low[at]), float(high[at]))
        for at, estimate in enumerate(estimates)
    ]


def mean_of_runs(
    counts: ArrayLike,
    measures: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: Sequence[tuple[float, float]],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    r"""The mean of measures over R training runs that were measured on the same rows, and an interval over both.

    With m_r the measure of run r, m the mean of these, and G groups of rows,

        v_rows = variance of m when groups are drawn with replacement, the same for all runs,
        v_runs = sum_r (m_r - m)^2 / (R (R - 1)),
        m +- t_df * sqrt(v_rows + v_runs),   df = (v_rows + v_runs)^2 / (v_rows^2 / (G - 1) + v_runs^2 / (R - 1)).

    The two variances estimate what other rows and what other seeds would change; how much a run suits the rows at hand
    is in both, which makes the interval a little too wide. df is Satterthwaite's (1946): where three seeds differ much,
    t is that of two degrees of freedom, 4.3. A single run has the interval of `bootstrap`, which knows of no other one.

    Args:
        counts: [R, N, K] what was counted in each row of each run.
        measures: from sums [..., K] to the values of M measures, [M, ...].
        groups: [N] what dependent rows share, such as the image.
        bounds: [M] the least and the greatest that each measure can be.
        level: the coverage.
        resamples: how many sets of groups are drawn.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than two rows or groups, or a count is not finite.
    """
    _check_level(level)
    runs = np.asarray(counts, dtype=np.float64)
    num_runs, num_rows, num_counts = runs.shape
    rows = runs.transpose(1, 0, 2).reshape(num_rows, num_runs * num_counts)

    def each(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([measures(part) for part in np.split(sums, num_runs, axis=-1)])

    def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = each(sums).mean(0)
        return values

    estimates, values, num_groups = _resampled(rows, mean, groups, resamples, seed)
    of_rows = values.var(-1, ddof=1)
    of_runs = each(rows.sum(0)).var(0, ddof=1) / num_runs if num_runs > 1 else np.zeros_like(of_rows)
    intervals = []
    for estimate, drawn, row, run, ends in zip(map(float, estimates), values, of_rows, of_runs, bounds, strict=True):
        if np.ptp(drawn) <= 1e-12 and run <= 1e-24:
            intervals.append(_certain(estimate, ends, num_groups, level))
            continue
        if num_runs == 1:
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        else:
            df = (row + run) ** 2 / (row**2 / (num_groups - 1) + run**2 / (num_runs - 1))
            reach = float(stats.t.ppf((1 + level) / 2, df)) * math.sqrt(row + run)
            low, high = max(ends[0], estimate - reach), min(ends[1], estimate + reach)
        intervals.append(Interval(estimate, float(low), float(high)))
    return intervals


def _resampled(
    counts: ArrayLike,
    measures: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: Sequence[Hashable] | None,
    resamples: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Measures of all rows [M], those of sets of groups drawn with replacement [M, resamples], the number of groups."""
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"bootstrap: counts of shape {list(rows.shape)}; expected finite numbers [rows, counts]")
    labels = _group_numbers(groups, len(rows))
    num_groups = int(labels.max(initial=-1)) + 1
    if num_groups < 2:
        raise ValueError(
            f"bootstrap: {len(rows)} rows in {num_groups} groups; an interval needs two groups, so measure more"
        )
    sums = np.zeros((num_groups, rows.shape[1]))
    np.add.at(sums, labels, rows)

    def drawn(indices: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        sets = indices.reshape(-1, num_groups)
        offsets = num_groups * np.arange(len(sets))[:, None]
        times = np.bincount((sets + offsets).ravel(), minlength=sets.size).reshape(sets.shape)  # each group's
        return measures(times @ sums)

    found = stats.bootstrap(
        (np.arange(num_groups),),
        drawn,
        n_resamples=resamples,
        batch=max(1, (1 << 22) // num_groups),  # a few dozen megabytes
        vectorized=True,
        axis=-1,
        method="percentile",
        random_state=np.random.default_rng(seed),  # `rng` only since scipy 1.15
    )
    return measures(sums.sum(0)), found.bootstrap_distribution, num_groups


def _certain(estimate: float, bounds: tuple[float, float], num_groups: int, level: float) -> Interval:
    """Of a measure that no drawn set changes: by the rule of three, as far as the bounds allow."""
    other = 1 - (1 - level) ** (1 / num_groups)
    low, high = ((1 - other) * estimate + other * bound for bound in bounds)
    return Interval(estimate, low, high)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    measures: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of `measures(after) - measures(before)`, both sides of a group drawn together; see `bootstrap`.

    Args:
        before: [N, K] what was counted in each row.
        after: [N, K] the same of the other side, in the same order.
        measures: from sums [..., K] to the values of M measures in [0, 1], [M, ...].
        groups: [N] what dependent rows share, such as the image.
        level: the coverage.
        resamples: how many sets are drawn.
        seed: of the draws.

    Raises:
        ValueError: the shapes differ, there are fewer than two rows or groups, or a count is not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_bootstrap: counts of shape {list(first.shape)} before but {list(second.shape)} after; "
            "expected the same rows of both"
        )

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        theirs, ours = np.split(sums, 2, axis=-1)
        return measures(ours) - measures(theirs)

    both = np.concatenate([first, second], axis=-1)
    return bootstrap(both, difference, groups, bounds=(-1.0, 1.0), level=level, resamples=resamples, seed=seed)


def _group_numbers(groups: Sequence[Hashable] | None, number: int) -> NDArray[np.intp]:
    """[N] the group of each pair, numbered from 0 in the order of appearance."""
    if groups is None:
        return np.arange(number)
    if len(groups) != number:
        raise ValueError(f"paired_difference: {len(groups)} groups for {number} pairs; expected the group of each pair")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name}: scores of shape {list(scores.shape)}; expected one number per image, [N]")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(f"{name}: score {bad[0]} of {scores.size} is {scores[bad[0]]}; expected finite numbers only")
    return scores


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}; expected a coverage between 0 and 1, such as 0.95")
