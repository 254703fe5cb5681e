"""Audit of the attributes that a judge predicts: errors and rank correlations with the ratings of held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmalign.data.pairs import ImagePair
from mmalign.evaluation.benchmarks.judge import rank_correlation
from mmalign.evaluation.judged_rows import JudgedRow
from mmalign.evaluation.metrics import Table
from mmalign.evaluation.statistics import Values, cluster_jackknife


def column(name: str) -> str:
    """Return the name of an attribute's predictions among the scores of a row."""
    return f"attribute {name}"


def audit(
    pairs: Sequence[ImagePair], rows: Sequence[JudgedRow], names: Sequence[str]
) -> tuple[dict[str, object], Table]:
    """Return root mean squared errors and rank correlations by attribute, and a table; intervals are over groups.

    Attributes with ratings in fewer than two groups are left out. The error is in the unit of the ratings. `spread` is
    the ratings' standard deviation, the error of a prediction that is always their mean. `names` are in the order of
    the ratings.
    """
    part = dict[str, object]()
    table = Table([("attribute", "images", "spread", "error after", "rank correlation")])
    for place, name in enumerate(names):
        # Images with a rating of this attribute: rating, prediction and group
        rated = [
            (ratings[place], prediction, pairs[row.number].group)
            for row in rows
            for ratings, prediction in zip(pairs[row.number].attributes, row.scores[column(name)], strict=True)
            if not math.isnan(ratings[place])
        ]
        groups = [group for *_, group in rated]
        if len(set(groups)) < 2:
            continue
        truth, predicted = (np.array([entry[side] for entry in rated]) for side in (0, 1))

        # Root mean squared error, with an interval over groups
        def root(sums: Values) -> Values:
            mean: Values = np.sqrt(sums[..., 0] / sums[..., 1])[None]
            return mean

        counts = np.stack([(truth - predicted) ** 2, np.ones_like(truth)], axis=-1)
        (error,) = cluster_jackknife([counts], root, groups, bounds=[(0.0, math.inf)])
        correlation = rank_correlation(truth, predicted, groups)
        # No error is 0, which is no hypothesis
        error = replace(error, p=None)
        numbers = {"error": error.as_dict(), "correlation": correlation.as_dict()}
        part[name] = {"images": len(rated), "spread": float(truth.std()), **numbers}
        table.append((name, str(len(rated)), f"{truth.std():.3g}", str(error), str(correlation)))
    return part, table if len(table) > 1 else Table()
