"""Comparison of pictures by small thumbnails that survive compression and scaling.

A thumbnail is an image's luma and chroma, averaged in a grid. Two images are nearly the same if no cell differs by more
than a tolerance, which grows with their contrast up to a highest one. Chroma is compared on half the grid, since JPEG
blurs it at the edges of colours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImageRef

LUMA, CHROMA = 16, 24  # highest tolerances, of 255 levels
_NOISE, _OF_CONTRAST = 6, 0.45  # a tolerance is this many levels, and this share of the channel's standard deviation
_CELL = 4  # pixels of a cell's side in small images
_GRIDS = (64, 32, 16)  # cells of a side; each divides the others
_PLAIN = 2  # levels; the highest standard deviation of a channel in a plain image
_COARSE = 4  # cells of a descriptor's side


@dataclass(frozen=True)
class Picture:
    """Facts of an image.

    Attributes:
        size: width and height in pixels; (0, 0) for an unreadable image.
        problem: the reason why the image cannot be read, or empty.
        descriptor: luma and chroma in 4 x 4 cells [48]. Those of nearly equal images differ by at most `CHROMA`.
    """

    size: tuple[int, int]
    problem: str = ""
    descriptor: NDArray[np.float32] = field(default_factory=lambda: np.zeros(3 * _COARSE**2, np.float32))


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image's YCbCr averages in a square grid, with 16 to 64 cells on a side."""
    cells = next((grid for grid in _GRIDS if min(image.size) >= _CELL * grid), _GRIDS[-1])
    return image.convert("YCbCr").resize((cells, cells), Image.Resampling.BILINEAR)


def nearly_equal(first: Image.Image, second: Image.Image) -> bool:
    """Return whether two thumbnails show the same picture."""
    cells = min(first.width, second.width)
    # Luma on the whole grid, then chroma on half of it
    for side, channels, highest in ((cells, slice(0, 1), LUMA), (cells // 2, slice(1, 3), CHROMA)):
        levels_first, levels_second = (_cells(image, side)[..., channels] for image in (first, second))
        contrast = max(levels.std((0, 1)).max() for levels in (levels_first, levels_second))
        if np.abs(levels_first - levels_second).max() > min(highest, _NOISE + _OF_CONTRAST * contrast):
            return False
    return True


def _cells(image: Image.Image, side: int) -> NDArray[np.float32]:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)


@lru_cache(maxsize=1024)
def look(ref: ImageRef) -> tuple[Picture, Image.Image | None]:
    """Return an image's facts and its thumbnail, or None if it cannot be read; the last 1024 images are kept."""
    try:
        image = decode(ref)
    except BadImage as error:
        return Picture((0, 0), error.skipped.reason), None
    small = thumbnail(image)
    return Picture(image.size, "", describe(small)), small


def describe(small: Image.Image) -> NDArray[np.float32]:
    """Return the descriptor [48] of a thumbnail."""
    return _cells(small, _COARSE).ravel()


def is_plain(small: Image.Image) -> bool:
    """Return whether a thumbnail shows one colour alone, as failed generations do."""
    return float(_cells(small, small.width).std((0, 1)).max()) < _PLAIN


def same_picture(first: ImageRef, second: ImageRef) -> bool:
    """Return whether two images are nearly the same; an unreadable one equals none but itself."""
    if first.key == second.key:
        return True
    small, other_small = look(first)[1], look(second)[1]
    return small is not None and other_small is not None and nearly_equal(small, other_small)
