"""Encoded images, of rows and of mmalign's own folders."""

import io
from pathlib import Path

from PIL import Image

from mmalign.data.caches.images import ImageCache
from mmalign.data.images import decode_file
from tests.fuzzing.rule import Files, Reader
from tests.helpers.data_files import png

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "DDS", "JPEG2000", "QOI", "AVIF")


def encoded() -> tuple[Files, ...]:
    """Return an image in every format that Pillow can write here."""
    image, files = Image.open(io.BytesIO(png(0))), []
    Image.init()
    for name in FORMATS:
        if name in Image.SAVE:
            buffer = io.BytesIO()
            image.save(buffer, name)
            files.append({"image.bin": buffer.getvalue()})
    image.convert("P").save(buffer := io.BytesIO(), "PNG", transparency=0)
    return (*files, {"image.bin": buffer.getvalue()})


def read_cache(folder: Path) -> None:
    cache = ImageCache(folder / "cache", {"model": "m"})
    cache.put("a fox", 0, Image.open(io.BytesIO(png(0))))
    (written,) = cache.folder.iterdir()
    written.unlink()
    written.symlink_to(folder / "image.bin")
    cache.get("a fox", 0)


READERS = (
    Reader(
        "images",
        lambda folder: decode_file(folder / "image.bin", "image.bin"),
        encoded(),
        share=150,
        places=("image.bin",),
    ),
    Reader("cached images", read_cache, encoded()[:1], share=20),
)
