"""Headline metrics of several recipes, and the differences between them, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mmalign.evaluation.metrics import Metrics, RunStatistics, compare_runs
from mmalign.evaluation.statistics import Interval, correct


class HeadlineMetric(NamedTuple):
    """A metric of one recipe's runs: the values of the runs, their mean, and the change from the base model."""

    label: str
    is_ratio: bool
    values: tuple[float, ...]
    mean: Interval
    change: Interval

    @property
    def header(self) -> str:
        """The label with its unit."""
        return f"{self.label}, %" if self.is_ratio else self.label

    def format(self, interval: Interval, signed: bool = False) -> str:
        """Format a mean, or a signed change; ratios in percent."""
        return interval.points(signed=signed) if self.is_ratio else str(interval)

    def format_difference(self, difference: Interval) -> str:
        """Format a difference in Markdown, bold if it survives the correction."""
        text = self.format(difference, signed=True)
        return f"**{text}**" if difference.is_certain else text


@dataclass(frozen=True)
class TableRow:
    """The runs of one recipe at one length; the base model is a row with a single run.

    Attributes:
        name: the recipe's name.
        method: its method; empty for the base model.
        num_pairs: the number of pairs at which all recipes are compared; None at the end of each recipe's own training.
        runs: the number of runs.
        pairs: the number of pairs that each run was trained on, with repetition.
        seconds: the training time until then, averaged over the runs (`loop.Progress`).
        measured: the base model's metrics and the statistics of the runs, for each benchmark.
        changes: the changes of the headline metrics from the base model, corrected by Holm over the table's cells.
        against: the differences from other recipes of the same length, by name, corrected over all such pairs.
        baseline: the name of the best baseline, and the differences from it, corrected over the baseline's table.
    """

    name: str
    method: str
    num_pairs: int | None
    runs: int
    pairs: int
    seconds: float
    measured: list[tuple[Metrics, RunStatistics]]
    changes: tuple[Interval, ...] = ()
    against: Mapping[str, tuple[Interval, ...]] = field(default_factory=dict)
    baseline: tuple[str, tuple[Interval, ...]] | None = None

    @property
    def metrics(self) -> list[HeadlineMetric]:
        """The headline metrics of all benchmarks."""
        metrics = [
            HeadlineMetric(
                base.label(name), name in base.ratios, runs.values[name], runs.means[name], runs.changes[name]
            )
            for base, runs in self.measured
            for name in base.headline_names
        ]
        if not self.changes:
            return metrics
        return [metric._replace(change=change) for metric, change in zip(metrics, self.changes, strict=True)]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers for JSON: every headline metric with its runs, its change and its other differences."""
        metrics = self.metrics

        def by_label(differences: Sequence[Interval]) -> dict[str, object]:
            return {m.label: difference.as_dict() for m, difference in zip(metrics, differences, strict=True)}

        return {
            "name": self.name,
            "method": self.method,
            "at": self.num_pairs,
            "runs": self.runs,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "measures": {
                m.label: {**m.mean.as_dict(), "runs": list(m.values), "change": m.change.as_dict()} for m in metrics
            },
            "against": {name: by_label(differences) for name, differences in self.against.items()},
            "against_baseline": {self.baseline[0]: by_label(self.baseline[1])} if self.baseline else {},
        }


def add_differences(
    base: TableRow, rows: Sequence[TableRow], runs: Sequence[Sequence[Sequence[Metrics]]], baselines: Sequence[str]
) -> list[TableRow]:
    """Return rows of one length with corrected changes, and their differences from the best baseline and each other.

    Args:
        base: the base model's row.
        rows: the recipes' rows, all of one length.
        runs: the metrics of each row's runs, by run and benchmark.
        baselines: methods that are baselines; the best recipe of them has the best first headline metric.
    """
    num_metrics = len(base.metrics)

    def differences(before: int, after: int) -> list[Interval]:
        sides = (zip(*runs[index], strict=True) for index in (before, after))
        by_benchmark = [compare_runs(*benchmark) for benchmark in zip(*sides, strict=True)]
        return [
            changes[name]
            for (metrics, _), changes in zip(base.measured, by_benchmark, strict=True)
            for name in metrics.headline_names
        ]

    def families(cells: Sequence[Sequence[Interval]]) -> list[tuple[Interval, ...]]:
        """Correct all cells of a table together."""
        corrected = iter(correct([cell for row in cells for cell in row]))
        return [tuple(next(corrected) for _ in range(num_metrics)) for _ in cells]

    # Changes from the base model, and all pairs of recipes
    changes = families([[metric.change for metric in row.metrics] for row in rows])
    pairs = [(before, after) for after in range(len(rows)) for before in range(after)]
    by_pair = dict(zip(pairs, families([differences(*pair) for pair in pairs]), strict=True))
    # The best baseline
    first = base.measured[0][0]
    sign = -1 if first.headline_names[0] in first.errors else 1
    scores = {i: sign * row.metrics[0].mean.estimate for i, row in enumerate(rows) if row.method in baselines}
    from_best: dict[int, tuple[str, tuple[Interval, ...]]] = {}
    if scores:
        best = max(scores, key=lambda index: scores[index])
        others = [index for index in range(len(rows)) if index != best]
        corrected = families([differences(best, index) for index in others])
        from_best = {index: (rows[best].name, cells) for index, cells in zip(others, corrected, strict=True)}
    return [
        replace(
            row,
            changes=changes[index],
            against={rows[before].name: by_pair[before, index] for before in range(index)},
            baseline=from_best.get(index),
        )
        for index, row in enumerate(rows)
    ]
