"""POVID's noise against its published schedule, and mDPO's crop against its own definition."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.augment import diffuse_image, random_crop, signal_share
from tests.helpers.golden import golden

GOLDEN = golden("povid")["noise_schedule"]


def flat(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def natural(side: int = 64) -> Image.Image:
    """Smooth, as photographs are: a slope with a disc on it."""
    y, x = np.mgrid[:side, :side] / side
    grey = 60 + 130 * x + 60 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.08)
    return Image.fromarray(np.stack([grey, grey * 0.8, 250 - grey], -1).astype(np.uint8))


def correlation(a: Image.Image, b: Image.Image) -> float:
    return float(np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1])


@pytest.mark.parametrize(("step", "expected"), [(int(k), v) for k, v in GOLDEN["alpha_bar"].items()])
def test_the_schedule_is_the_published_one(step: int, expected: float) -> None:
    assert signal_share()[step].item() == pytest.approx(expected, rel=1e-6)


def test_a_noisy_pixel_by_hand() -> None:
    """At step 500 a grey of 100 / 255 under noise of 0.4: 255 * (0.8630 * 0.3922 + 0.5052 * 0.4) = 137.83."""
    levels = GOLDEN["sqrt_alpha_bar_500"], GOLDEN["sqrt_one_minus_alpha_bar_500"]
    assert 255 * (levels[0] * 100 / 255 + levels[1] * 0.4) == pytest.approx(137.83, abs=0.01)
    image = diffuse_image(flat(100), torch.full((8, 8, 3), 0.4), 500)
    assert np.unique(np.asarray(image)).tolist() == [138]


@pytest.mark.parametrize(("index", "wrapped"), list(enumerate(GOLDEN["uint8_wrap"]["torch_byte_x86"])))
def test_overflow_wraps_as_published_or_is_clamped(index: int, wrapped: int) -> None:
    """The noise that takes black to the published value before it becomes a byte."""
    value = GOLDEN["uint8_wrap"]["in_float_times_255"][index]
    noise = torch.full((8, 8, 3), value / 255 / GOLDEN["sqrt_one_minus_alpha_bar_500"])
    noise *= 1 + 1e-5  # no hair short of a whole number
    assert np.unique(np.asarray(diffuse_image(flat(0), noise, 500, overflow="wrap"))).tolist() == [wrapped]
    assert np.unique(np.asarray(diffuse_image(flat(0), noise, 500))).tolist() == [0 if value < 0 else 255]


def test_clamping_leaves_the_picture_and_wrapping_does_not() -> None:
    """Published: two of five values overflow at step 500; of photographs, shrunk as a model takes them, a correlation

    of 0.68 to 0.79 is left after clamping and less than 0.02 after wrapping. Here of a drawing, shrunk to a quarter.
    """
    image = natural()
    noise = torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(0))
    clamped, wrapped = (diffuse_image(image, noise, 500, overflow=way) for way in ("clamp", "wrap"))  # type: ignore[arg-type]
    ends = np.isin(np.asarray(clamped), (0, 255)).mean()
    assert 0.25 < ends < 0.55
    small = [one.resize((16, 16), Image.Resampling.BOX) for one in (image, clamped, wrapped)]
    assert correlation(small[0], small[1]) > 0.6 and abs(correlation(small[0], small[2])) < 0.1


@pytest.mark.parametrize("size", [(31, 17), (8, 40)])
def test_noisy_image_keeps_its_size_and_noise_grows(size: tuple[int, int]) -> None:
    image = natural().resize(size)
    noise = torch.randn(size[1], size[0], 3, generator=torch.Generator().manual_seed(1))
    result = [diffuse_image(image, noise, step) for step in (0, 250, 500, 999)]
    assert all(one.size == size and one.mode == "RGB" for one in result)
    left = [correlation(image, one) for one in result]
    assert left == sorted(left, reverse=True) and left[0] > 0.99


def slope(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, each as a share of 200."""
    y, x = np.mgrid[:height, :width]
    red, green = 200 * (x + 0.5) / width, 200 * (y + 0.5) / height
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


def seen(image: Image.Image, u: list[float], keep: tuple[float, float]) -> tuple[float, float, float, float]:
    """Width, height, and centre of what a crop shows, as shares of the picture, read off the slope."""
    pixels = np.asarray(random_crop(image, torch.tensor(u), area_range=keep)).astype(float) / 200
    red, green = pixels[..., 0].mean(0), pixels[..., 1].mean(1)
    spans = ((one[-1] - one[0]) * len(one) / (len(one) - 1) for one in (red, green))
    return (*spans, red.mean(), green.mean())  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_crop_shows_the_share_and_the_ratio_that_were_drawn(share: float, ratio: float) -> None:
    """Of a square of 400: the ratio is 3/4 at the draw 0, 1 at a half, 4/3 at 1. Read to a level of 200 and a pixel."""
    width, height, *_ = seen(slope(400, 400), [0.5, ratio, 0.3, 0.6], (share, share))
    expected = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
    assert width * height == pytest.approx(share, abs=0.02)
    assert width / height == pytest.approx(expected, rel=0.05)


def test_the_area_is_between_the_least_and_the_greatest() -> None:
    for u, share in ((0.0, 0.1), (0.5, 0.2), (0.999999, 0.3)):
        width, height, *_ = seen(slope(300, 300), [u, 0.5, 0.5, 0.5], (0.1, 0.3))
        assert width * height == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (0.999999, 0.0), (0.5, 0.5), (0.25, 0.999999)])
def test_a_crop_lies_where_it_was_drawn(right: float, down: float) -> None:
    """A quarter of the area, half of either side: its centre is between 1/4 and 3/4."""
    *_, x, y = seen(slope(400, 400), [0.5, 0.5, right, down], (0.25, 0.25))
    assert (x, y) == pytest.approx((0.25 + 0.5 * right, 0.25 + 0.5 * down), abs=0.01)


@pytest.mark.parametrize("size", [(640, 48), (20, 300), (8, 8)])
def test_a_crop_of_any_picture_keeps_its_size_and_its_area(size: tuple[int, int]) -> None:
    """Also where a part of the ratio drawn would not fit: then it is as high, or as wide, as the picture."""
    for share in (0.01, 0.2, 1.0):
        image = random_crop(slope(*size), torch.tensor([0.0, 1.0, 0.9, 0.9]), area_range=(share, share))
        assert image.size == size
    width, height, *_ = seen(slope(640, 48), [0.0, 1.0, 0.5, 0.5], (0.2, 0.2))
    assert height == pytest.approx(1.0, abs=0.03) and width == pytest.approx(0.2, abs=0.02)


def test_a_crop_of_everything_is_the_picture_itself() -> None:
    image = natural()
    crop = random_crop(image, torch.rand(4, generator=torch.Generator().manual_seed(0)), area_range=(1.0, 1.0))
    assert np.array_equal(np.asarray(crop), np.asarray(image))
