"""Best of n: the base model's best output of n by a judge, without any training.

A baseline for methods that learn from the same judge: its KL divergence from the base model is at most `kl_bound(n)`
(arXiv:2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.evaluation.metrics import Metrics, Table, compare

STRIDE = 10_000_000_019  # between the seeds of an image's candidates, more than the number of images


def kl_bound(n: int) -> float:
    """Return `ln n - (n - 1) / n`, the largest KL divergence from the base model, in nats."""
    return math.log(n) - (n - 1) / n


def describe_bound(n: int) -> str:
    """Return the bound in words."""
    return f"KL <= {kl_bound(n):.2f} nats"


def candidate_seeds(seeds: Sequence[int], n: int) -> list[list[int]]:
    """Return the seeds of n candidates of each image; the first candidate is the image itself."""
    return [[seed + number * STRIDE for seed in seeds] for number in range(n)]


def best_candidates(scores: Sequence[Sequence[float]], n: int) -> list[int]:
    """Return the number of the best of each image's first n candidates, the earliest of equal ones.

    Args:
        scores: the judge's scores, [candidates][images].
        n: the number of candidates to choose from.
    """
    return [max(range(n), key=lambda number: column[number]) for column in zip(*scores[:n], strict=True)]


def report(
    before: Sequence[Metrics], chosen: Mapping[int, Sequence[Metrics]], count: Sequence[str] = ()
) -> tuple[dict[str, dict[str, Any]], Table]:
    """Compare the best of n with the base model; return numbers by n for result.json, and a table.

    `chosen` has the metrics of the best outputs, by n; `count` a further column after the first, header and value.
    """
    numbers, table, header = dict[str, dict[str, Any]](), list[tuple[str, ...]](), count[:1]
    for n, measured in chosen.items():
        comparisons = [compare(base, best) for base, best in zip(before, measured, strict=True)]
        numbers[str(n)] = {"kl_bound": kl_bound(n)} | {x.before.benchmark: x.as_dict() for x in comparisons}
        table.append((f"best of {n} ({describe_bound(n)})", *header, "before", "best", "change [95 % interval]"))
        rows = [row for comparison in comparisons for row in comparison.table()[1:]]
        table += [(name, *count[1:], *cells) for name, *cells in rows]
    return numbers, table
