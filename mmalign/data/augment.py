"""Disturbed pictures: POVID's noise and mDPO's crop, functions of a picture and of random numbers that are given.

Both work on the picture as it was decoded, before a model's processor takes it, and keep its size: its tokens are as
many as the undisturbed picture's, whatever the model. H, W are its height and width in pixels.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUM_STEPS = 1000  # of the noise schedule
_RATIOS = (3 / 4, 4 / 3)  # of a crop's width to its height, as torchvision's RandomResizedCrop takes them


@cache
def signal_share() -> Tensor:
    """POVID's noise schedule, abar [1000]: the share of the picture's variance that is left at every step.

    betas = sigmoid(linspace(-6, 6)) scaled to [1e-5, 5e-3], and abar_t the product of 1 - beta up to and with step t
    (the release of arXiv:2402.11411, train_dpo_inherent.py).
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, NUM_STEPS)) * (5e-3 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, 0)


def diffuse_image(
    image: Image.Image, noise: Tensor, step: int, *, overflow: Literal["clamp", "wrap"] = "clamp"
) -> Image.Image:
    """A picture at a step of the noise schedule: sqrt(abar) x_0 + sqrt(1 - abar) eps, of values in [0, 1].

    At step 500 two of five values leave [0, 1]. The release converts them to bytes as they are, so that they wrap
    around (1.1 becomes dark): hardly anything of the picture is left then, where clamping leaves its outlines.

    Args:
        image: RGB.
        noise: standard normal numbers [H, W, 3].
        step: from 0, nearly clean, to 999.
        overflow: "clamp" values to [0, 1], or "wrap" them around as the release does.
    """
    abar = signal_share()[step]
    x_0 = torch.from_numpy(np.array(image)).float() / 255
    x_t = (abar.sqrt() * x_0 + (1 - abar).sqrt() * noise) * 255
    # A byte is made of a number by cutting its fraction off and keeping the rest modulo 256.
    whole = x_t.round().clamp(0, 255) if overflow == "clamp" else x_t.trunc().remainder(256)
    return Image.fromarray(whole.to(torch.uint8).numpy())


def random_crop(image: Image.Image, u: Tensor, *, area_range: tuple[float, float] = (0.01, 0.2)) -> Image.Image:
    """A random part of a picture, enlarged to the picture's size.

    The part's area is uniform in `area_range`, the logarithm of its width to height uniform between those of 3/4 and
    4/3, its place uniform in the picture (as torchvision's RandomResizedCrop, but that a part which would not fit into
    a very long picture is made narrower and keeps its area, where torchvision draws again).

    Args:
        image: RGB.
        u: uniform draws [4] in [0, 1): area, ratio, and how far right and down of the room there is.
        area_range: the least and the greatest share of the picture's area.
    """
    area_u, ratio_u, right, down = u.double().tolist()
    area = (area_range[0] + (area_range[1] - area_range[0]) * area_u) * image.width * image.height
    low, high = (math.log(ratio) for ratio in _RATIOS)
    width = math.sqrt(area * math.exp(low + (high - low) * ratio_u))
    width = min(max(width, area / image.height), image.width)
    height = area / width
    left, top = right * (image.width - width), down * (image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)
