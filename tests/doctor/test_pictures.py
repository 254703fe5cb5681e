"""Pictures are recognized after compression and scaling, and different ones are told apart."""

import io
from itertools import combinations

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.doctor.pictures import CHROMA, describe, is_plain, nearly_equal, thumbnail
from tests.helpers.doctor_data import drawing, jpeg


def recompressed(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(image, 75)))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Return bundled scenes of one object each, and blocks of colour; no two are the same."""
    rows = pq.read_table("assets/quickstart-pairs.parquet", columns=["jpg_0", "jpg_1"]).slice(0, 12).to_pylist()
    cells = [row[column] for row in rows for column in ("jpg_0", "jpg_1")]
    scenes = [
        Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)).convert("RGB") for cell in cells
    ]
    return [*scenes, *map(drawing, range(12))]


def test_copies_are_recognized(pictures: list[Image.Image]) -> None:
    for image in pictures:
        small = thumbnail(image)
        copies = [
            recompressed(image),
            *(image.resize((side, side), Image.Resampling.BICUBIC) for side in (50, 96, 256)),
        ]
        for copy in map(thumbnail, copies):
            assert nearly_equal(small, copy) and nearly_equal(copy, small)
            assert abs(describe(small) - describe(copy)).max() <= CHROMA + 2


def test_different_pictures_are_told_apart(pictures: list[Image.Image]) -> None:
    assert not [pair for pair in combinations(map(thumbnail, pictures), 2) if nearly_equal(*pair)]


def test_a_changed_detail_is_seen() -> None:
    """A square of a hundredth of the area, and a faint one on a plain ground, make another picture."""
    photo = drawing(1, 512).resize((1024, 1024), Image.Resampling.BICUBIC)
    plain = Image.new("RGB", (64, 64), (240, 238, 230))
    for image, box, colour in ((photo, (400, 400, 500, 500), "red"), (plain, (20, 20, 30, 30), (240, 225, 190))):
        changed = image.copy()
        changed.paste(colour, box)
        assert not nearly_equal(thumbnail(image), thumbnail(changed))
        assert nearly_equal(thumbnail(image), thumbnail(recompressed(image)))


def test_plain_images_are_known(pictures: list[Image.Image]) -> None:
    assert not any(is_plain(thumbnail(image)) for image in pictures)
    assert is_plain(thumbnail(Image.new("RGB", (64, 48), "teal")))
