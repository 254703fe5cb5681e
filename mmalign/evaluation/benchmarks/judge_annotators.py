"""Audit of what a judge learned of its annotators: accuracy by each one's own taste and by the mean of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmalign.data.pairs import ImagePair
from mmalign.evaluation.benchmarks.judge import Comparisons
from mmalign.evaluation.metrics import SIDES, Table
from mmalign.evaluation.statistics import proportion

MEAN = "mean of annotators"  # name of the judge's scores for somebody unknown
ALL = "all annotators"


def audit(
    pairs: Sequence[ImagePair], comparisons: Comparisons, shares: Mapping[str, Sequence[float]]
) -> tuple[dict[str, object], Table]:
    """Return accuracies on the pairs of known annotators, also by prototype, and a table; intervals are over groups.

    An annotator belongs to the prototype with the largest share. Ties of the labels are left out; a tie of the judge is
    half right. A row of the table without such pairs is left out. Annotators without such pairs are not counted. The
    comparisons have scores of the trained judge and of `MEAN`; each annotator has shares [K].
    """
    names = np.array([pairs[number].label.annotator for number, *_ in comparisons.keys])
    part: dict[str, object] = {"shares": {name: list(own) for name, own in shares.items()}}
    table = Table([("annotators", "pairs", "right by own taste, %", "right by mean taste, %")])
    largest = {name: int(np.argmax(own)) + 1 for name, own in shares.items()}
    number = len(next(iter(shares.values())))
    belong = {ALL: list(shares)}
    if number > 1:
        belong |= {f"prototype {k}": [x for x, own in largest.items() if own == k] for k in range(1, number + 1)}
    for title, members in belong.items():
        where = np.flatnonzero(np.isin(names, members) & (comparisons.share != 0.5))
        if not where.size:
            continue
        groups, first = [comparisons.groups[i] for i in where], comparisons.share[where] > 0.5
        own, mean = (
            proportion(np.where(first, verdicts, 1 - verdicts), groups)
            for verdicts in (comparisons.verdicts(judge)[where] for judge in (SIDES[1], MEAN))
        )
        numbers = {"own": own.as_dict(), "mean": mean.as_dict()}
        judged = len({*names[where].tolist()})
        part[title] = {"annotators": judged, "pairs": len(where), **numbers}
        label = f"{title} ({judged})"
        table.append((label, str(len(where)), own.points(signed=False), mean.points(signed=False)))
    return part, table if len(table) > 1 else Table()
