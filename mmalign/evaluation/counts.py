"""What was counted in a model's responses, the measures of it, and what changed from one model to another.

N responses. Every measure of the benchmarks beside this file is either a function of sums over all responses (a share:
invented mentions of all mentions, an F1) or a mean per response (the length in words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmalign.evaluation.intervals import Interval, bootstrap, mean_of_runs, paired_bootstrap, paired_difference

Values = NDArray[np.float64]
Sums = Mapping[str, Values]
Share = Callable[[Sums], Values]
SIDES = ("before", "after")


def ratio(part: Values, whole: Values) -> Values:
    """part / whole, and 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def f1(right: Values, said: Values, true: Values) -> Values:
    """The harmonic mean of precision right / said and recall right / true: 2 right / (said + true)."""
    return ratio(2 * right, said + true)


@dataclass(frozen=True)
class Counts:
    """What was counted in each of N responses.

    Attributes:
        benchmark: its name, for tables and result.json.
        keys: [N] what was asked; no two alike. Two models are compared on the same keys.
        groups: [N] what dependent responses share: the image.
        columns: from the name of a count to its values [N].
        shares: from the name of a measure in [0, 1] to a function of the columns' sums.
        means: the columns whose mean per response is a measure.
        main: the measures that a short table shows; all, if not given.
    """

    benchmark: str
    keys: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]
    columns: Mapping[str, Values]
    shares: Mapping[str, Share]
    means: tuple[str, ...] = ()
    main: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError(f"{self.benchmark}: there is no response to measure; expected at least one")
        again = next((key for key, times in Counter(self.keys).items() if times > 1), None)
        if again is not None:
            raise ValueError(
                f"{self.benchmark}: {_named(again)} is answered twice; expected one response to each question"
            )

    @property
    def sums(self) -> dict[str, float]:
        """Every count over all responses."""
        return {name: float(values.sum()) for name, values in self.columns.items()}

    @property
    def values(self) -> dict[str, float]:
        """Every measure."""
        shares = self.measure(self.matrix.sum(0))
        means = {name: float(self.columns[name].mean()) for name in self.means}
        return {**dict(zip(self.shares, map(float, shares), strict=True)), **means}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Every measure with its 95 % interval: by bootstrap over the groups, for means by Student's t over them.

        Raises:
            ValueError: there are fewer than two groups.
        """
        shares = bootstrap(self.matrix, self.measure, self.groups)
        nothing = np.zeros(len(self.keys))
        means = {name: paired_difference(nothing, self.columns[name], self.groups) for name in self.means}
        return {**dict(zip(self.shares, shares, strict=True)), **means}

    @property
    def matrix(self) -> Values:
        """[N, K] the columns, in order."""
        return np.stack(list(self.columns.values()), axis=-1)

    def measure(self, sums: Values) -> Values:
        """[M, ...] the shares, from sums of the columns [..., K]."""
        by_name = {name: sums[..., at] for at, name in enumerate(self.columns)}
        return np.stack([share(by_name) for share in self.shares.values()])

    @property
    def in_short(self) -> tuple[str, ...]:
        """The names of the main measures."""
        return self.main or (*self.shares, *self.means)

    def label(self, name: str) -> str:
        """A measure's name beside those of other benchmarks: "POPE accuracy" for "mean: accuracy"."""
        whole, colon, rest = name.partition(": ")
        return f"{self.benchmark} {rest}" if colon and whole in ("mean", "all") else name

    def of(self, keys: Sequence[Hashable]) -> Values:
        """[N, K] the columns in the order of these keys, which are the own ones in any order."""
        place = {key: at for at, key in enumerate(self.keys)}
        return self.matrix[[place[key] for key in keys]]

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first: a measure and its value."""
        rows = [self.shown(name, interval) for name, interval in self.intervals.items()]
        return [(self.benchmark, f"{len(self.keys)} responses [95 % interval]"), *rows]

    def shown(self, name: str, *intervals: Interval) -> tuple[str, ...]:
        """A row of a table: a measure and its values, a third one as the change; shares in percent."""
        if name not in self.shares:
            return (name, *map(str, intervals))
        return (f"{name}, %", *(interval.points(signed=at == 2) for at, interval in enumerate(intervals)))

    def as_dict(self) -> dict[str, object]:
        """For result.json: shares in [0, 1], and the counts that they come from."""
        measures = {name: interval.as_dict() for name, interval in self.intervals.items()}
        return {
            "benchmark": self.benchmark,
            "responses": len(self.keys),
            "groups": len(set(self.groups)),
            "measures": measures,
            "counts": self.sums,
        }


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions, and the paired differences (after - before, 95 %, by image)."""

    before: Counts
    after: Counts
    differences: Mapping[str, Interval]

    def table(self, *, short: bool = False) -> list[tuple[str, ...]]:
        """Rows of text, the header first: measure, before, after, change; of all measures, or of the main ones."""
        rows = []
        for name in self.before.in_short if short else self.differences:
            sides = [counts.intervals[name] for counts in (self.before, self.after)]
            row = self.before.shown(name, *sides, self.differences[name])
            rows.append((self.before.label(row[0]) if short else row[0], *row[1:]))
        return [(self.before.benchmark, "before", "after", "change [95 % interval]"), *rows]

    def as_dict(self) -> dict[str, object]:
        """Numbers for result.json; differences of shares in [-1, 1]."""
        return {
            "benchmark": self.before.benchmark,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "difference": {name: interval.as_dict() for name, interval in self.differences.items()},
        }


def compare(before: Counts, after: Counts) -> Comparison:
    """What changed from `before` to `after`, which answered the same questions, in any order.

    Raises:
        ValueError: the benchmarks or the questions differ, or there are fewer than two images.
    """
    _check_alike(before, after)
    theirs, ours = before.matrix, after.of(before.keys)
    shares = paired_bootstrap(theirs, ours, before.measure, before.groups)
    at = {name: place for place, name in enumerate(before.columns)}
    means = {name: paired_difference(theirs[:, at[name]], ours[:, at[name]], before.groups) for name in before.means}
    return Comparison(before, after, {**dict(zip(before.shares, shares, strict=True)), **means})


@dataclass(frozen=True)
class Runs:
    """Training runs of one kind that answered the same questions, as another model did.

    Attributes:
        values: every measure of each run.
        means: their means, with 95 % intervals over questions and runs (`intervals.mean_of_runs`).
        changes: the paired differences from the other model, alike.
    """

    values: Mapping[str, tuple[float, ...]]
    means: Mapping[str, Interval]
    changes: Mapping[str, Interval]


def over_runs(base: Counts, runs: Sequence[Counts]) -> Runs:
    """What R runs of a training, which differ in their seed, are like beside the model that they began with.

    Raises:
        ValueError: there is no run, the benchmarks or the questions differ, or there are fewer than two images.
    """
    if not runs:
        raise ValueError(f"{base.benchmark}: there is no run to measure; expected at least one")
    for run in runs:
        _check_alike(base, run)
    theirs = _with_rows(base.matrix)
    ours = np.stack([_with_rows(run.of(base.keys)) for run in runs])
    names, columns = (*base.shares, *base.means), list(base.columns)
    averaged = [columns.index(name) for name in base.means]

    def measures(sums: Values) -> Values:
        shares = base.measure(sums[..., :-1])
        return np.concatenate([shares, *([ratio(sums[..., at], sums[..., -1])] for at in averaged)])

    def change(sums: Values) -> Values:
        other, own = np.split(sums, 2, axis=-1)
        return measures(own) - measures(other)

    both = np.concatenate([np.broadcast_to(theirs, ours.shape), ours], axis=-1)
    spans = [max(1.0, float(np.ptp(both[..., [at, at + theirs.shape[1]]]))) for at in averaged]
    ends = [(0.0, 1.0)] * len(base.shares) + [(0.0, float(ours[..., at].max())) for at in averaged]
    far = [(-1.0, 1.0)] * len(base.shares) + [(-span, span) for span in spans]
    each = np.stack([measures(run.sum(0)) for run in ours], axis=-1)
    return Runs(
        {name: tuple(values.tolist()) for name, values in zip(names, each, strict=True)},
        dict(zip(names, mean_of_runs(ours, measures, base.groups, bounds=ends), strict=True)),
        dict(zip(names, mean_of_runs(both, change, base.groups, bounds=far), strict=True)),
    )


def _with_rows(matrix: Values) -> Values:
    """The columns and one more, whose sum is the number of rows."""
    return np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)


def _check_alike(before: Counts, after: Counts) -> None:
    """That two models were asked the same."""
    if (before.benchmark, list(before.shares)) != (after.benchmark, list(after.shares)):
        raise ValueError(
            f"compare: {before.benchmark} ({', '.join(before.shares)}) before, {after.benchmark} "
            f"({', '.join(after.shares)}) after; expected two results of the same measures"
        )
    only = [sorted(map(_named, set(one.keys) - set(two.keys))) for one, two in ((before, after), (after, before))]
    if any(only):
        sides = [f"{len(keys)} only {side} ({keys[0]}, ...)" for side, keys in zip(SIDES, only, strict=True) if keys]
        raise ValueError(
            f"{before.benchmark}: the two models did not answer the same: {' and '.join(sides)}; "
            "expected one response to each question from both"
        )


def _named(key: Hashable) -> str:
    """A key for an error message: "popular, 12"."""
    return ", ".join(str(part) for part in key if part != "") if isinstance(key, tuple) else str(key)
