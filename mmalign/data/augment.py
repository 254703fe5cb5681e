"""Image corruptions for vision-language methods: POVID's diffusion noise and mDPO's random crop.

Both are functions of a decoded image and of given random numbers. They keep the image's size, so a corrupted image has
as many tokens as the original in every model. H, W are the image's height and width in pixels.
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
_RATIOS = (3 / 4, 4 / 3)  # range of a crop's width / height, as in torchvision's RandomResizedCrop


@cache
def signal_share() -> Tensor:
    """Return POVID's noise schedule, abar [1000]: the share of the image's variance that remains at every step.

    betas = sigmoid(linspace(-6, 6)) scaled to [1e-5, 5e-3]. abar_t is the product of 1 - beta up to and including step
    t (the release of arXiv:2402.11411, train_dpo_inherent.py).
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, NUM_STEPS)) * (5e-3 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, 0)


def diffuse_image(
    image: Image.Image, noise: Tensor, step: int, *, overflow: Literal["clamp", "wrap"] = "clamp"
) -> Image.Image:
    """Return an image at a step of the noise schedule: sqrt(abar) x_0 + sqrt(1 - abar) eps, with x_0 in [0, 1].

    At step 500 two of five values leave [0, 1]. The release converts them to bytes as they are, so they wrap around
    (1.1 becomes dark). Wrapping destroys almost all of the image; clamping preserves its outlines.

    Args:
        image: RGB.
        noise: standard normal numbers [H, W, 3].
        step: index from 0 (nearly clean) to 999.
        overflow: "clamp" to [0, 1], or "wrap" around as in the release.
    """
    abar = signal_share()[step]
    x_0 = torch.from_numpy(np.array(image)).float() / 255
    x_t = (abar.sqrt() * x_0 + (1 - abar).sqrt() * noise) * 255
    # Wrapping truncates and takes the remainder modulo 256, as a cast to bytes does
    whole = x_t.round().clamp(0, 255) if overflow == "clamp" else x_t.trunc().remainder(256)
    return Image.fromarray(whole.to(torch.uint8).numpy())


def random_crop(image: Image.Image, u: Tensor, *, area_range: tuple[float, float] = (0.01, 0.2)) -> Image.Image:
    """Return a random crop of an image, resized to the image's size.

    The crop follows torchvision's RandomResizedCrop. Its area is uniform in `area_range`, its log aspect ratio uniform
    between log(3/4) and log(4/3), and its position uniform in the image. A crop that does not fit changes its aspect
    ratio and preserves its area; torchvision redraws it instead.

    Args:
        image: RGB.
        u: uniform draws [4] in [0, 1): area, aspect ratio, horizontal and vertical position.
        area_range: the least and greatest area of the crop, as shares of the image's area.
    """
    # Area and log aspect ratio, then the width that they give, bounded so that both sides fit
    area_u, ratio_u, right, down = u.double().tolist()
    area = (area_range[0] + (area_range[1] - area_range[0]) * area_u) * image.width * image.height
    low, high = (math.log(ratio) for ratio in _RATIOS)
    width = math.sqrt(area * math.exp(low + (high - low) * ratio_u))
    width = min(max(width, area / image.height), image.width)
    height = area / width
    left, top = right * (image.width - width), down * (image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)
