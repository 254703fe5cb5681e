"""How different pictures of one prompt are: what a model loses first when it is pushed too far towards one judge."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from PIL.Image import Image


def apart(images: Sequence[Image], groups: Sequence[Hashable]) -> list[float]:
    """The mean distance [N] of every picture to the others of its group, in [0, 1]; 0 if they are all the same.

    The distance of two pictures is the root of their mean squared difference over pixels and channels, where white and
    black are 1 apart. No network is in it, so that no judge's taste is; it does not know what a picture shows, so it is
    fit to compare models on the same prompts, not prompts with each other.

    Args:
        images: N, those of a group of the same size.
        groups: what pictures share that should differ, such as the prompt.

    Raises:
        ValueError: a picture is alone in its group, or has another size than the others.
    """
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    found = [0.0] * len(images)
    for group, numbers in members.items():
        if len(numbers) < 2:
            raise ValueError(f"diversity: there is one picture of {group!r}; expected two or more of each prompt")
        sizes = {images[number].size for number in numbers}
        if len(sizes) > 1:
            raise ValueError(f"diversity: pictures of {group!r} have the sizes {sorted(sizes)}; expected one size")
        pixels = np.stack([np.asarray(images[n].convert("RGB"), dtype=np.float64).ravel() / 255 for n in numbers])
        for place, number in enumerate(numbers):
            far = np.sqrt(np.square(pixels - pixels[place]).mean(1))
            found[number] = float(far.sum() / (len(numbers) - 1))
    return found
