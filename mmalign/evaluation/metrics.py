"""Metrics of a model's responses, comparisons of two models, and statistics over training runs.

Shapes: N responses (answers or images), K columns of counts, M metrics, R training runs. A metric is a ratio of the
columns' sums over all responses (invented mentions of all mentions, an F1), or the mean of a column (length in words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mmalign.evaluation.statistics import RATE, Interval, Measures, Values, cluster_jackknife, paired, paired_difference

Sums = Mapping[str, Values]
Ratio = Callable[[Sums], Values]  # from sums of columns to a metric in [0, 1]
Table = list[tuple[str, ...]]  # rows of text, the header first
SIDES = ("before", "after")


def divide(part: Values, whole: Values) -> Values:
    """Return part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def f1(right: Values, predicted: Values, actual: Values) -> Values:
    """Return 2 right / (predicted + actual), the harmonic mean of right / predicted and right / actual."""
    return divide(2 * right, predicted + actual)


def ratio(part: str, whole: str) -> Ratio:
    """Return a function that divides the sums of two columns, given by name."""
    return lambda sums: divide(sums[part], sums[whole])


def as_columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Values]:
    """Return the values [N] of each count, from one record of counts for each response."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]} if rows else {}


def as_columns_by_kind(kinds: Sequence[str], rows: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, Values]:
    """Return the values [N] of each count by kind of response, named such as "random: right", from kinds and counts.

    A response's values for other kinds are 0.
    """
    by_kind = [
        {f"{kind}: {name}": value * (kind == row_kind) for kind in kinds for name, value in counts.items()}
        for row_kind, counts in rows
    ]
    return as_columns(by_kind)


@dataclass(frozen=True)
class Metrics:
    """Metrics of N responses, and the counts behind them.

    Attributes:
        benchmark: the benchmark's name, for tables and result.json.
        keys: [N] the questions, all different. Two models are compared on the same keys.
        groups: [N] a key that dependent responses share: the image, or the prompt.
        columns: the values [N] of each count, by name.
        ratios: functions of the columns' sums, by the name of the metric in [0, 1].
        means: the columns whose mean is a metric.
        headline: the metrics of a short table; all of them by default.
        errors: the metrics that are better when lower.

    Raises:
        ValueError: there is no response, or two have the same key.
    """

    benchmark: str
    keys: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]
    columns: Mapping[str, Values]
    ratios: Mapping[str, Ratio]
    means: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError(f"{self.benchmark}: no responses; expected at least one")
        repeated = next((key for key, times in Counter(self.keys).items() if times > 1), None)
        if repeated is not None:
            raise ValueError(
                f"{self.benchmark}: {_format_key(repeated)} is answered twice; expected one response to each question"
            )

    @property
    def values(self) -> dict[str, float]:
        """The value of every metric."""
        ratios = zip(self.ratios, map(float, self.measure(self.matrix.sum(0))), strict=True)
        return {**dict(ratios), **{name: float(self.columns[name].mean()) for name in self.means}}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Every metric with its interval over groups: jackknife for ratios, Student's t for means.

        Raises:
            ValueError: there are fewer than two groups.
        """
        if len(set(self.groups)) < 2:
            raise ValueError(
                f"{self.benchmark}: all {len(self.keys):,} responses are about {self.groups[0]}; an interval needs two "
                "images or prompts, so evaluate more"
            )
        ratios = cluster_jackknife([self.matrix], self.measure, self.groups, bounds=[RATE] * len(self.ratios))
        # A mean is its difference from 0, which is no hypothesis
        zeros = np.zeros(len(self.keys))
        means = {
            name: replace(paired_difference(zeros, self.columns[name], self.groups), p=None) for name in self.means
        }
        return {**dict(zip(self.ratios, ratios, strict=True)), **means}

    @property
    def matrix(self) -> Values:
        """The columns [N, K]."""
        return np.stack(list(self.columns.values()), axis=-1)

    def measure(self, sums: Values) -> Values:
        """Return the ratios [M, ...] from sums of the columns [..., K]."""
        by_name = {name: sums[..., index] for index, name in enumerate(self.columns)}
        return np.stack([ratio(by_name) for ratio in self.ratios.values()])

    @property
    def headline_names(self) -> tuple[str, ...]:
        """The names of the headline metrics."""
        return self.headline or (*self.ratios, *self.means)

    def label(self, name: str) -> str:
        """Return a metric's name for a table of several benchmarks: "POPE accuracy" for "mean: accuracy"."""
        scope, colon, metric = name.partition(": ")
        return f"{self.benchmark} {metric}" if colon and scope in ("mean", "all") else name

    def matrix_of(self, keys: Sequence[Hashable]) -> Values:
        """Return the columns [N, K] in the order of `keys`, a permutation of this object's keys."""
        indices = {key: index for index, key in enumerate(self.keys)}
        return self.matrix[[indices[key] for key in keys]]

    def table(self) -> Table:
        """Return a table of every metric's value."""
        rows = [self.format_row(name, interval) for name, interval in self.intervals.items()]
        return [(self.benchmark, f"{len(self.keys)} responses [95 % interval]"), *rows]

    def format_row(self, name: str, *intervals: Interval) -> tuple[str, ...]:
        """Return a table row: a metric and its values, the third one a signed change; ratios in percent."""
        if name not in self.ratios:
            return (name, *map(str, intervals))
        return (f"{name}, %", *(interval.points(signed=index == 2) for index, interval in enumerate(intervals)))

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json: metrics (ratios in [0, 1]) and sums of the counts."""
        return {
            "benchmark": self.benchmark,
            "responses": len(self.keys),
            "groups": len(set(self.groups)),
            "measures": {name: interval.as_dict() for name, interval in self.intervals.items()},
            "counts": {name: float(values.sum()) for name, values in self.columns.items()},
        }


@dataclass(frozen=True)
class MetricsComparison:
    """Metrics of two models on the same questions, and the paired differences (after - before)."""

    before: Metrics
    after: Metrics
    differences: Mapping[str, Interval]

    def table(self, *, short: bool = False) -> Table:
        """Return a table of values before and after and their change; `short` selects the headline metrics."""
        rows = []
        for name in self.before.headline_names if short else self.differences:
            values = [metrics.intervals[name] for metrics in (self.before, self.after)]
            label, *cells = self.before.format_row(name, *values, self.differences[name])
            rows.append((self.before.label(label) if short else label, *cells))
        return [(self.before.benchmark, *SIDES, "change [95 % interval]"), *rows]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for result.json; differences of ratios are in [-1, 1]."""
        return {
            "benchmark": self.before.benchmark,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "difference": {name: interval.as_dict() for name, interval in self.differences.items()},
        }


def compare(before: Metrics, after: Metrics) -> MetricsComparison:
    """Compare the metrics of two models that answered the same questions, in any order.

    Raises:
        ValueError: the benchmarks or the questions differ, or there are fewer than two groups.
    """
    _check_comparable(before, after)
    # Ratios: jackknife over the columns of both models side by side
    first, second, bounds = before.matrix, after.matrix_of(before.keys), [(-1.0, 1.0)] * len(before.ratios)
    both = np.concatenate([first, second], axis=-1)
    ratios = cluster_jackknife([both], paired(before.measure), before.groups, bounds=bounds)
    # Means: paired differences
    indices = {name: list(before.columns).index(name) for name in before.means}
    means = {name: paired_difference(first[:, i], second[:, i], before.groups) for name, i in indices.items()}
    return MetricsComparison(before, after, {**dict(zip(before.ratios, ratios, strict=True)), **means})


@dataclass(frozen=True)
class RunStatistics:
    """Statistics of training runs that answered the same questions as a base model.

    Attributes:
        values: the values [R] of every metric.
        means: the mean of every metric over runs, with an interval over questions and runs (`cluster_jackknife`).
        changes: the mean paired difference of every metric from the base model, with such an interval.
    """

    values: Mapping[str, tuple[float, ...]]
    means: Mapping[str, Interval]
    changes: Mapping[str, Interval]


def summarize_runs(base: Metrics, runs: Sequence[Metrics]) -> RunStatistics:
    """Return the statistics of R training runs that differ in their seed, relative to their base model.

    Raises:
        ValueError: there is no run, the benchmarks or the questions differ, or there are fewer than two groups.
    """
    changes = compare_runs([base] * len(runs), runs)
    counts, measures = _counts(base, runs), _run_measures(base)
    averaged = [counts[..., list(base.columns).index(name)] for name in base.means]
    # Ratios are in [0, 1], and means among 0 and the values that occur
    bounds = [RATE] * len(base.ratios) + [(min(0.0, float(x.min())), float(x.max())) for x in averaged]
    means = cluster_jackknife(counts, measures, base.groups, bounds=bounds)
    # Values of each run [M, R]
    values = np.stack([measures(run.sum(0)) for run in counts], axis=-1)
    names = (*base.ratios, *base.means)
    return RunStatistics(
        {name: tuple(row.tolist()) for name, row in zip(names, values, strict=True)},
        {name: replace(mean, p=None) for name, mean in zip(names, means, strict=True)},
        changes,
    )


def compare_runs(before: Sequence[Metrics], after: Sequence[Metrics]) -> dict[str, Interval]:
    """Return the mean difference of every metric, after - before, of R training runs each, paired by question and run.

    Raises:
        ValueError: there is no run, the benchmarks or the questions differ, or there are fewer than two groups.
    """
    if not after:
        raise ValueError("compare: there is no run to measure; expected at least one")
    first = before[0]
    for run in (*before, *after):
        _check_comparable(first, run)
    # Counts of both sides, side by side [R, N, 2 K + 2]
    counts = np.concatenate([_counts(first, before), _counts(first, after)], axis=-1)
    indices = [list(first.columns).index(name) for name in first.means]
    # Means differ at most by the range of their column on both sides
    spans = [max(1.0, float(np.ptp(counts[..., [i, i + counts.shape[-1] // 2]]))) for i in indices]
    bounds = [(-1.0, 1.0)] * len(first.ratios) + [(-span, span) for span in spans]
    changes = cluster_jackknife(counts, paired(_run_measures(first)), first.groups, bounds=bounds)
    return dict(zip((*first.ratios, *first.means), changes, strict=True))


def _counts(base: Metrics, runs: Sequence[Metrics]) -> Values:
    """Return the columns of the runs in the order of the base model's keys, and a one for every row [R, N, K + 1]."""
    ones = np.ones((len(base.keys), 1))
    return np.stack([np.concatenate([run.matrix_of(base.keys), ones], axis=1) for run in runs])


def _run_measures(base: Metrics) -> Measures:
    """Return a function from sums of `_counts` to the ratios and means."""
    averaged = [list(base.columns).index(name) for name in base.means]

    def measures(sums: Values) -> Values:
        means = [divide(sums[..., index], sums[..., -1]) for index in averaged]
        return np.concatenate([base.measure(sums[..., :-1]), *([mean] for mean in means)])

    return measures


def _check_comparable(before: Metrics, after: Metrics) -> None:
    """Raise ValueError if the benchmarks, their ratios or the questions of two models differ."""
    if (before.benchmark, list(before.ratios)) != (after.benchmark, list(after.ratios)):
        raise ValueError(
            f"compare: {before.benchmark} ({', '.join(before.ratios)}) before, {after.benchmark} "
            f"({', '.join(after.ratios)}) after; expected two results of the same measures"
        )
    alone = set(before.keys) - set(after.keys), set(after.keys) - set(before.keys)
    if any(alone):
        sides = [
            f"{len(keys)} only {side} ({min(map(_format_key, keys))}, ...)"
            for side, keys in zip(SIDES, alone, strict=True)
            if keys
        ]
        raise ValueError(
            f"{before.benchmark}: the two models answered different questions: {' and '.join(sides)}; expected one "
            "response to each question from both"
        )


def _format_key(key: Hashable) -> str:
    """Format a key for an error message: "popular, 12"."""
    return ", ".join(str(part) for part in key if part != "") if isinstance(key, tuple) else str(key)
