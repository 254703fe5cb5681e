"""Decoding of good, odd and bad images, and the geometry of crops."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import ImageSize
from mmalign.data.images import (
    BadImage,
    ImageTransform,
    decode,
    image_key,
    image_size,
    is_flipped,
    prepare,
    prepare_pair,
)
from mmalign.data.pairs import ImageRef

SQUARE = ImageSize(32, 32)
VIEWS = ((64, 64, False), (64, 64, True), (128, 128, False), (64, 128, False))  # width, height, mirrored


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ref(data: bytes) -> ImageRef:
    return ImageRef("key", lambda: "pairs.parquet: row 17, jpg_0", lambda: data)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A PNG of a few kilobytes whose header says 20,000 x 20,000."""
    return encoded(Image.new("1", (20_000, 20_000)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>not found</html>", "not a readable image"),
        (encoded(noise(64, 64))[:2000], "not a readable image"),
        (encoded(noise(64, 64), "JPEG")[:1500], "not a readable image"),
        (encoded(Image.new("RGB", (1, 1))), "is 1x1; expected at least 8"),
        (encoded(Image.new("RGB", (64, 4))), "is 64x4; expected at least 8"),
        (encoded(Image.new("F", (16, 16)), "TIFF"), "no defined range"),
    ],
)
def test_a_bad_image_says_where_and_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as error:
        decode(ref(data))
    assert str(error.value).startswith("pairs.parquet: row 17, jpg_0: ")


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb()
    assert len(data) < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(BadImage, match="80,000,000"):
        decode(ref(data))
    monkeypatch.setattr("mmalign.data.images.MAX_PIXELS", 399)
    with pytest.raises(BadImage, match=r"is 20x20; expected .* at most 399 in all"):
        decode(ref(encoded(noise(20, 20))))


def test_an_unreadable_file_is_a_bad_image() -> None:
    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(BadImage, match="cannot be read"):
        decode(ImageRef("key", lambda: "x.png", gone))


def test_transparency_is_blended_with_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black on white
    result = decode(ref(encoded(image)))
    assert [result.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (255, 0, 0), (204, 204, 204)]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    result = decode(ref(encoded(palette, transparency=0)))
    assert [result.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]


def test_other_modes_become_rgb() -> None:
    assert decode(ref(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))).getpixel((0, 0)) == (255, 0, 0)
    assert decode(ref(encoded(Image.new("L", (8, 8), 7)))).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert decode(ref(encoded(deep))).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    image = noise(12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated a quarter clockwise
    upright = decode(ref(encoded(image, exif=exif)))
    assert upright.size == (8, 12)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_the_right_size_is_not_resampled() -> None:
    image = noise(16, 16)
    pixels, sizes = prepare(image, ImageSize(16, 16))
    assert torch.equal((pixels + 1).mul(127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image)))
    assert pixels.dtype == torch.float32 and sizes.tolist() == [16, 16, 0, 0, 16, 16]


def test_the_centre_crop_by_hand() -> None:
    """24 x 16 at R = 16: no scaling, 8 columns too many, 4 on each side. 48 x 32 likewise after halving."""
    image = noise(24, 16)
    pixels, sizes = prepare(image, ImageSize(16, 16))
    assert sizes.tolist() == [16, 24, 0, 4, 16, 16]
    assert torch.equal(pixels, prepare(image.crop((4, 0, 20, 16)), ImageSize(16, 16))[0])
    assert prepare(noise(48, 32), ImageSize(16, 16))[1].tolist() == [32, 48, 0, 4, 16, 16]


def test_scaling_keeps_a_ramp() -> None:
    """A ramp over 64 columns, halved: every pixel is the mean of two; doubled: it still rises from end to end."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3)).copy())
    halved = (prepare(ramp, SQUARE)[0][0, 16] + 1) * 127.5
    assert (halved[4:-4] - (torch.arange(32) * 8 + 2.0)[4:-4]).abs().max() <= 1
    doubled = prepare(ramp, ImageSize(128, 128))[0][0, 64]
    assert (doubled.diff() >= 0).all() and doubled[0] < -0.98 and doubled[-1] > 0.95


def test_a_scaled_crop_lies_where_its_sizes_say() -> None:
    """96 x 64 halved is 48 x 32; with left = 8, column j is the mean of the columns 16 + 2 j and 17 + 2 j."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (64, 96, 3)).copy())
    pixels, sizes = prepare(ramp, SQUARE)
    assert sizes.tolist() == [64, 96, 0, 8, 32, 32]
    columns = ((pixels + 1) * 127.5)[0, 16]
    assert (columns - (torch.arange(32) * 4 + 33.0))[4:-4].abs().max() <= 1


def test_flipped_crop_is_the_mirror_image() -> None:
    image = noise(20, 16)
    plain, at = prepare(image, ImageSize(16, 16), crop_position=(0.0, 0.0))
    mirrored, mirrored_at = prepare(image, ImageSize(16, 16), crop_position=(0.0, 0.0), mirror=True)
    assert torch.equal(mirrored, plain.flip(-1))
    assert at.tolist()[2:4] == [0, 0] and mirrored_at.tolist()[2:4] == [0, 4]


def test_both_images_share_the_relative_crop_and_the_flip() -> None:
    """u_left = 0.5 of 16 columns to spare is 8; of 32 (scaled from 64 x 32 at R = 32) it is 16."""
    u = torch.tensor([0.5, 0.5, 0.4])
    pixels, sizes = prepare_pair([noise(48, 32), noise(128, 64)], SQUARE, ImageTransform("random"), u)
    assert pixels.shape == (2, 3, 32, 32)
    assert sizes.tolist() == [[32, 48, 0, 8, 32, 32], [64, 128, 0, 16, 32, 32]]
    same = noise(40, 32)
    pixels, _ = prepare_pair([same, same], SQUARE, ImageTransform("random", flip=True), torch.tensor([0.1, 0.9, 0.4]))
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], prepare(same, SQUARE, crop_position=(0.1, 0.9), mirror=True)[0])
    assert not is_flipped(True, torch.tensor([0.0, 0.0, 0.5])) and not is_flipped(False, u) and is_flipped(True, u)


def test_a_long_strip_is_not_blown_up() -> None:
    """Scaled whole, 8 x 200,000 at R = 512 would be 20 GB."""
    pixels, sizes = prepare(Image.new("RGB", (200_000, 8)), ImageSize(512, 512))
    assert pixels.shape == (3, 512, 512) and sizes.tolist() == [8, 200_000, 0, 6_399_744, 512, 512]


def test_views_have_different_keys() -> None:
    image = ref(b"")
    keys = {image_key(image, ImageSize(*size), mirror=mirror) for *size, mirror in VIEWS}
    assert len(keys) == len(VIEWS)


def test_crops_and_padding_of_other_shapes() -> None:
    """48 x 32 in 32 x 16: the crop of 48 x 24 begins at row 4 of 32, so at 2.67 of 21.3; padded it is 24 x 16."""
    image, size = noise(48, 32), ImageSize(32, 16)
    pixels, sizes = prepare(image, size)
    assert pixels.shape == (3, 16, 32) and sizes.tolist() == [32, 48, 2, 0, 16, 32]
    whole = image.resize((32, 16), Image.Resampling.LANCZOS, box=(0, 2 / 21 * 32, 48, 2 / 21 * 32 + 24))
    assert torch.equal(as_bytes(pixels), torch.from_numpy(np.array(whole)))
    padded, sizes = prepare(image, size, pad=True, mirror=True)
    assert padded.shape == (3, 16, 32) and sizes.tolist() == [32, 48, 0, 0, 16, 32]
    assert (padded[..., :4] == 1).all() and (padded[..., -4:] == 1).all() and (padded[..., 4:-4] < 1).any()
    inner = np.array(image.resize((24, 16), Image.Resampling.LANCZOS))[:, ::-1].copy()
    assert torch.equal(as_bytes(padded)[:, 4:-4], torch.from_numpy(inner))


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0)


def test_size_is_that_of_the_decoded_image() -> None:
    assert image_size(ref(encoded(noise(20, 12)))) == (20, 12)
    rotated = Image.Exif()
    for orientation in range(10):  # 0 and 9 have no meaning
        rotated[0x0112] = orientation
        data = encoded(noise(20, 12), "JPEG", exif=rotated)
        assert image_size(ref(data)) == decode(ref(data)).size, orientation
    with pytest.raises(BadImage, match="no known format"):
        image_size(ref(b"text"))
