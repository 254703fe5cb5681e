"""Which images are most alike, by unit vectors of them.

N images, E the width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

COPY = 1 - 1e-5  # two images with this cosine are one under two names
ROWS = 1024  # of the table of cosines that are in memory at once


def nearest(vectors: Tensor, number: int) -> list[list[int]]:
    """For each image those most like it, the most alike first; neither itself nor a copy of it.

    Args:
        vectors: [N, E], of length 1.
        number: how many, where there are so many.
    """
    found: list[list[int]] = []
    for first in range(0, len(vectors), ROWS):
        some = vectors[first : first + ROWS]
        cosines = some @ vectors.T
        best = cosines.masked_fill(cosines >= COPY, -torch.inf).topk(min(number, len(vectors)))
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            ranked = sorted(zip(values, places, strict=True), key=lambda one: (-one[0], one[1]))
            found.append([place for value, place in ranked if value > -torch.inf])
    return found
