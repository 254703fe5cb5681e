"""Diversity of images generated for one prompt; falls first under reward over-optimization."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL.Image import Image

from mmalign.evaluation.metrics import Metrics, ratio


def pixel_distances(images: Sequence[Image], groups: Sequence[Hashable]) -> list[float]:
    """Return the mean distance [N] of every image to the others of its group, in [0, 1]; 0 if all are equal.

    The distance of two images is the root of their mean squared difference over pixels and channels: 1 for white and
    black. It needs no network and no reward model. It ignores the content of an image, so compare models on the same
    prompts, not prompts with each other.

    Images [N] of a group have one key, such as the prompt, and one size.

    Raises:
        ValueError: a group has a single image, or images of different sizes.
    """
    members = defaultdict[Hashable, list[int]](list)
    for index, group in enumerate(groups):
        members[group].append(index)
    distances = [0.0] * len(images)
    for group, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"diversity: there is one image of {group!r}; expected two or more of each prompt")
        sizes = {images[index].size for index in indices}
        if len(sizes) > 1:
            raise ValueError(f"diversity: images of {group!r} have the sizes {sorted(sizes)}; expected one size")
        pixels = np.stack([np.asarray(images[i].convert("RGB"), dtype=np.float64).ravel() / 255 for i in indices])
        for index, own_pixels in zip(indices, pixels, strict=True):
            # The distance of an image to itself is 0, and is not counted
            to_others = np.sqrt(np.square(pixels - own_pixels).mean(1))
            distances[index] = float(to_others.sum() / (len(indices) - 1))
    return distances


def measure_distances(distances: ArrayLike, keys: tuple[Hashable, ...], groups: tuple[Hashable, ...]) -> Metrics:
    """Return the mean of `pixel_distances` [N] as a metric; keys are prompt and seed, groups are prompts."""
    columns = {"images": np.ones(len(keys)), "apart": np.asarray(distances)}
    return Metrics("diversity", keys, groups, columns, {"diversity": ratio("apart", "images")})
