"""Best of n: the base model's best output of n by a judge, without any training.

A baseline for methods that learn from the same judge: its KL divergence from the base model is at most `kl_bound(n)`
(arXiv:2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
