"""Pixel distances of images of one prompt, by hand."""

import pytest
from PIL import Image

from mmalign.evaluation.benchmarks.diversity import pixel_distances

WHITE, BLACK = (Image.new("RGB", (4, 4), grey) for grey in ("white", "black"))
HALF = Image.new("RGB", (4, 4), "white")
HALF.paste((0, 0, 0), (0, 0, 2, 4))


def test_pixel_distances_by_hand() -> None:
    """White and black are 1 apart, and half black is sqrt(1/2) from either."""
    far = pixel_distances([WHITE, BLACK, HALF], ["a"] * 3)
    root = 0.5**0.5
    assert far == pytest.approx([(1 + root) / 2, (1 + root) / 2, root])


def test_pixel_distances_are_within_groups() -> None:
    assert pixel_distances([WHITE, BLACK, WHITE, WHITE], ["a", "b", "a", "b"]) == pytest.approx([0, 1, 0, 1])


def test_pixel_distances_refuse_a_single_image() -> None:
    with pytest.raises(ValueError, match="one image of 'b'; expected two or more"):
        pixel_distances([WHITE, BLACK, WHITE], ["a", "a", "b"])


def test_pixel_distances_refuse_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"sizes \[\(2, 2\), \(4, 4\)\]"):
        pixel_distances([WHITE, Image.new("RGB", (2, 2))], ["a", "a"])
