"""Safe decoding of images, and crops and flips shared by both images of a pair.

R resolution. Pixels are float32 in [-1, 1]; sizes are the six numbers of SDXL's micro-conditioning.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmalign.data.formats.files import MAX_IMAGE_BYTES
from mmalign.data.pairs import ImageRef, SkippedRow
from mmalign.reading import check_file

MIN_SIDE = 8  # pixels; smaller images are placeholders for deleted ones
MAX_PIXELS = 80_000_000  # 240 MB as RGB


class BadImage(ValueError):
    """Error for an unusable image, with its location and the reason.

    Attributes:
        skipped: the record of the image.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(location, reason)
        self.skipped = SkippedRow(location, reason)

    def __str__(self) -> str:
        return str(self.skipped)


def decode(ref: ImageRef, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as RGB: rotated as its EXIF says, transparent parts on white, the first frame of several.

    The header is checked before decoding, so that a small file cannot claim much memory.

    Raises:
        BadImage: the image cannot be read, has a side below `min_side`, or has more than `max_pixels` pixels.
    """
    try:
        if ref.path:
            check_file(ref.path, MAX_IMAGE_BYTES)
        data = ref.read()
    except OSError as error:
        raise BadImage(ref.location, f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise BadImage(ref.location, "has zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; the size is checked below
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height <= max_pixels and min(width, height) >= min_side:
                return _rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(ref.location, f"is larger than {max_pixels:,} pixels") from error
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadImage(ref.location, f"is not a readable image of {len(data):,} bytes (no known format)") from error
    except Exception as error:  # a broken file may raise anything in Pillow: OSError, SyntaxError, struct.error ...
        raise BadImage(ref.location, f"is not a readable image of {len(data):,} bytes ({error})") from error
    limits = f"at least {min_side} pixels a side and at most {max_pixels:,} in all"
    raise BadImage(ref.location, f"is {width}x{height}; expected {limits}")


def decode_file(path: Path, location: str) -> Image.Image:
    """Read an image file as `decode` does; `location` names it in messages.

    Raises:
        BadImage: the image cannot be read.
    """
    return decode(ImageRef(str(path), lambda: location, path.read_bytes, str(path)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def is_flipped(flip: bool, u: Tensor) -> bool:
    """Check whether a pair is mirrored; `u` [3] are its uniform draws for top, left and flip."""
    return flip and bool(u[2] < 0.5)


def prepare_pair(
    chosen: Image.Image, rejected: Image.Image, resolution: int, *, crop: str, flip: bool, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both images at R x R, with the same relative crop and the same flip: pixels [2, 3, R, R], sizes [2, 6].

    Args:
        chosen: RGB.
        rejected: RGB; may have another size.
        resolution: R, pixels.
        crop: "center" or "random".
        flip: mirror half of the pairs.
        u: the pair's draws [3] in [0, 1): top, left, flip.
    """
    crop_position = (float(u[0]), float(u[1])) if crop == "random" else (0.5, 0.5)
    sides = [
        prepare(image, resolution, crop_position=crop_position, mirror=is_flipped(flip, u))
        for image in (chosen, rejected)
    ]
    return torch.stack([pixels for pixels, _ in sides]), torch.stack([sizes for _, sizes in sides])


def prepare(
    image: Image.Image, resolution: int, *, crop_position: tuple[float, float] = (0.5, 0.5), mirror: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale an image's short side to R, crop it to a square, and optionally mirror it.

    Args:
        image: RGB.
        resolution: R, pixels.
        crop_position: vertical and horizontal position of the crop, from 0 (top, left) to 1 (bottom, right).
        mirror: flip horizontally.

    Returns:
        Pixels [3, R, R] and sizes [6]. The crop's corner is given in the scaled (and mirrored) image.
    """
    # Crop corner in the scaled image
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    rooms = (height - resolution, width - resolution)
    top, left = (int(share * (room + 1 - 1e-6)) for share, room in zip(crop_position, rooms, strict=True))
    if scale == 1:
        square = image.crop((left, top, left + resolution, top + resolution))
    else:
        # Scale only the crop: an image of 8 x 1,000,000 must not become one of 1024 x 128,000,000.
        x, y, side = left / width * image.width, top / height * image.height, min(image.size)
        x, y = min(x, image.width - side), min(y, image.height - side)
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        square = image.resize((resolution, resolution), method, box=(x, y, x + side, y + side))
    if mirror:
        square, left = ImageOps.mirror(square), width - resolution - left
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
    sizes = torch.tensor([image.height, image.width, top, left, resolution, resolution])
    return pixels, sizes


def image_key(ref: ImageRef, resolution: int, *, mirror: bool) -> str:
    """Return the cache key of an image: its content, its crop and its flip; random crops are not cached."""
    return f"{ref.key}/{resolution}-center" + ("-mirrored" if mirror else "")
