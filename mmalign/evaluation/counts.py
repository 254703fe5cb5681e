"""What was counted in a model's responses, the measures of it, and what changed from one model to another.

N responses. Every measure of the benchmarks beside this file is either a function of sums over all responses (a share:
invented mentions of all mentions, an F1) or a mean per response (the length in words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmalign.evaluation.intervals import Interval, bootstrap, paired_bootstrap, paired_difference

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
    """

    benchmark: str
    keys: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]
    columns: Mapping[str, Values]
    shares: Mapping[str, Share]
    means: tuple[str, ...] = ()

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

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first: measure, before, after, change."""
        rows = []
        for name, change in self.differences.items():
            sides = [counts.intervals[name] for counts in (self.before, self.after)]
            rows.append(self.before.shown(name, *sides, change))
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
    place = {key: at for at, key in enumerate(after.keys)}
    order = np.array([place[key] for key in before.keys])
    shares = paired_bootstrap(before.matrix, after.matrix[order], before.measure, before.groups)
    means = {
        name: paired_difference(before.columns[name], after.columns[name][order], before.groups)
        for name in before.means
    }
    return Comparison(before, after, {**dict(zip(before.shares, shares, strict=True)), **means})


def _named(key: Hashable) -> str:
    """A key for an error message: "popular, 12"."""
    return ", ".join(str(part) for part in key if part != "") if isinstance(key, tuple) else str(key)
