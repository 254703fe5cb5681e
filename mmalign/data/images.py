"""Safe decoding of images, and crops and flips shared by both images of a pair.

H, W are the height and width of a training image. Pixels are float32 in [-1, 1]; sizes are the six numbers of SDXL's
micro-conditioning.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.data.formats.image_files import MAX_IMAGE_BYTES
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


def decode(ref: ImageRef) -> Image.Image:
    """Read an image as RGB: rotated as its EXIF says, transparent parts on white, the first frame of several.

    The header is checked before decoding, so that a small file cannot claim much memory.

    Raises:
        BadImage: the image cannot be read, has a side below `MIN_SIDE`, or has more than `MAX_PIXELS` pixels.
    """
    with _opened(ref) as image:
        return _rgb(ImageOps.exif_transpose(image))


def image_size(ref: ImageRef) -> ImageSize:
    """Return an image's size after the rotation of its EXIF; only the header is decoded.

    Raises:
        BadImage: as `decode` does; damage behind the header is not noticed.
    """
    with _opened(ref) as image:
        width, height = image.size
        return ImageSize(height, width) if image.getexif().get(_ORIENTATION) in _TURNED else ImageSize(width, height)


_ORIENTATION, _TURNED = 0x0112, range(5, 9)  # EXIF tag, and its values that exchange width and height


@contextlib.contextmanager
def _opened(ref: ImageRef) -> Iterator[Image.Image]:
    """Yield an image whose header is read and allowed; errors of the block are errors of the image.

    Raises:
        BadImage: the image cannot be read, or its size is not allowed.
    """
    try:
        # Bytes, of a bounded size
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
            if width * height <= MAX_PIXELS and min(width, height) >= MIN_SIDE:
                # Pixels are decoded in the caller's block, whose errors arrive here
                yield image
                return
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(ref.location, f"is larger than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadImage(ref.location, f"is not a readable image of {len(data):,} bytes (no known format)") from error
    except Exception as error:  # a broken file may raise anything in Pillow: OSError, SyntaxError, struct.error ...
        raise BadImage(ref.location, f"is not a readable image of {len(data):,} bytes ({error})") from error
    # The image could be opened, and its size is not allowed
    limits = f"at least {MIN_SIDE} pixels a side and at most {MAX_PIXELS:,} in all"
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


@dataclass(frozen=True)
class ImageTransform:
    """Settings of the cut to training images.

    Attributes:
        crop: "center" or "random".
        flip: mirror half of the pairs.
        pad: pad the whole image with white instead of cropping it.
    """

    crop: str = "center"
    flip: bool = False
    pad: bool = False


def prepare_pair(
    images: Sequence[Image.Image], size: ImageSize, transform: ImageTransform, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a pair's K images in one size, with the same relative crop and flip: pixels [K, 3, H, W], sizes [K, 6].

    Args:
        images: RGB; may have different sizes.
        size: W and H.
        transform: crop, flip and padding.
        u: the pair's draws [3] in [0, 1): top, left, flip.
    """
    crop_position = (float(u[0]), float(u[1])) if transform.crop == "random" else (0.5, 0.5)
    mirror = is_flipped(transform.flip, u)
    sides = [prepare(image, size, crop_position=crop_position, mirror=mirror, pad=transform.pad) for image in images]
    return torch.stack([pixels for pixels, _ in sides]), torch.stack([sizes for _, sizes in sides])


def prepare(
    image: Image.Image,
    size: ImageSize,
    *,
    crop_position: tuple[float, float] = (0.5, 0.5),
    mirror: bool = False,
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale an image until it covers W x H, crop it, and optionally mirror it; or scale it into W x H, and pad it.

    Args:
        image: RGB.
        size: W and H.
        crop_position: vertical and horizontal position of the crop, from 0 (top, left) to 1 (bottom, right).
        mirror: flip horizontally.
        pad: pad with white instead of cropping.

    Returns:
        Pixels [3, H, W] and sizes [6]. The crop's corner is given in the scaled (and mirrored) image; it is 0, 0 with
        padding.
    """
    if pad:
        top = left = 0
        cut = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="white")
        cut = ImageOps.mirror(cut) if mirror else cut
    else:
        cut, top, left = _crop(image, size, crop_position, mirror=mirror)
    # Bytes [H, W, 3] to numbers [3, H, W]
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
    return pixels, torch.tensor([image.height, image.width, top, left, size.height, size.width])


def _crop(
    image: Image.Image, size: ImageSize, crop_position: tuple[float, float], *, mirror: bool
) -> tuple[Image.Image, int, int]:
    """Return the scaled crop, and its corner's top and left in the scaled image."""
    # Largest part of the image with the aspect ratio of the size
    box = (float(image.width), size.height * image.width / size.width)
    if box[1] > image.height:
        box = (size.width * image.height / size.height, float(image.height))
    scale = max(size.width / image.width, size.height / image.height)

    # Crop corner in the scaled image
    scaled = [max(least, round(side * scale)) for side, least in zip(image.size, size, strict=True)]
    rooms = (scaled[1] - size.height, scaled[0] - size.width)
    top, left = (int(share * (room + 1 - 1e-6)) for share, room in zip(crop_position, rooms, strict=True))
    if scale == 1:
        cut = image.crop((left, top, left + size.width, top + size.height))
    else:
        # Scale only the crop: an image of 8 x 1,000,000 must not become one of 1024 x 128,000,000.
        x, y = left / scaled[0] * image.width, top / scaled[1] * image.height
        x, y = min(x, image.width - box[0]), min(y, image.height - box[1])
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        cut = image.resize(size, method, box=(x, y, x + box[0], y + box[1]))
    # In the mirrored image the corner is as far from the left as the cut is from the right
    if mirror:
        return ImageOps.mirror(cut), top, rooms[1] - left
    return cut, top, left


def image_key(ref: ImageRef, size: ImageSize, *, mirror: bool) -> str:
    """Return the cache key of an image: its content, its size and its flip; random crops are not cached."""
    return f"{ref.key}/{size}" + ("-mirrored" if mirror else "")
