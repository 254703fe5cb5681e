"""Images that rows name or hold: paths in a folder, data URIs, and bytes in tables and archives.

Rows come from strangers: a path must not leave its folder, and must name a regular file of a bounded size.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.data.formats.files import shorten
from mmalign.data.pairs import ImageRef, UnusableRowError
from mmalign.reading import check_file

MAX_IMAGE_BYTES = 2**29  # 512 MiB; no encoded image of usable size is larger
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")

_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")
_DATA_URI = re.compile(r"data:[\w/+.;=-]*,", re.IGNORECASE)


@dataclass(slots=True, unsafe_hash=True)
class StoredImage:
    """Image in a table or an archive, read on access; its place stands for its content.

    Attributes:
        place: the position in its source; two images of one place are the same.
        column: the name of its column or member, for messages.
        load: a function from the place to the bytes.
    """

    place: Hashable
    column: str = field(compare=False)
    load: Callable[[Any], bytes] = field(compare=False)

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            OSError: the table or archive cannot be read.
        """
        return self.load(self.place)


Image = str | StoredImage  # a path or data URI, or an image in a table or archive


def as_image(value: object) -> Image:
    """Return the image of a row's value; a struct with a path stands for the path.

    Raises:
        UnusableRowError: there is no image, or the value is not one.
    """
    if isinstance(value, StoredImage):
        return value
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("url") or value.get("image")
    if value is None or value == "":
        raise UnusableRowError("has no image", "missing image")
    if not isinstance(value, str | StoredImage):
        raise UnusableRowError(f"{shorten(value)} is not an image; expected a path, a data URI or bytes")
    return value


class ImageReader:
    """Reader of the images of a source's rows, which keeps each image's key, a hash of its bytes.

    Args:
        folder: the folder that paths are relative to; each row's own folders if not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._keys = folder, dict[Hashable, str]()

    def check(self, image: Image, folders: Sequence[Path]) -> None:
        """Check that an image exists, without decoding it; `folders` are those of its row.

        Raises:
            UnusableRowError: the file does not exist, is outside the folders, irregular or too large, or the value is a
                URL or a broken data URI.
        """
        # Bytes of a table or archive exist, and what a URI holds is decoded to find out
        if isinstance(image, StoredImage):
            return
        if _DATA_URI.match(image):
            decode_uri(image)
            return
        if _URL.match(image):
            raise UnusableRowError(
                f"the image {shorten(image)} is a URL, which is never fetched; download it and give its path"
            )
        # A path: absent, a device or a pipe, or a file whose size is checked
        path = self._path(image, folders)
        if not is_file(path):
            if os.path.exists(str(path).replace("\0", "")) and not path.is_dir():
                raise UnusableRowError(f"the image {shorten(image)} cannot be read (not a regular file)")
            raise UnusableRowError(f"the image {shorten(image)} does not exist", "missing image")
        try:
            check_file(path, MAX_IMAGE_BYTES)
        except OSError as error:
            raise UnusableRowError(f"the image {shorten(image)} cannot be read ({error.strerror})") from error

    def ref(self, image: Image, folders: Sequence[Path], locate: Callable[[], str]) -> ImageRef:
        """Return a reference to a checked image, which is read once for its key."""
        if isinstance(image, StoredImage):
            return ImageRef(self._key(image.place, image.read), locate, image.read)
        if _DATA_URI.match(image):
            load = partial(decode_uri, image)
            return ImageRef(self._key(image, load), locate, load)
        path = self._path(image, folders)
        try:
            key = self._key(str(path), path.read_bytes) if is_file(path) else f"gone:{path}"
        except OSError:  # deleted since it was indexed: `ImageRef.read` raises the error
            key = f"gone:{path}"
        return ImageRef(key, locate, path.read_bytes, str(path))

    def _key(self, cell: Hashable, load: Callable[[], bytes]) -> str:
        if cell not in self._keys:
            self._keys[cell] = f"bytes:{hashlib.blake2b(load(), digest_size=16).hexdigest()}"
        return self._keys[cell]

    def _path(self, name: str, folders: Sequence[Path]) -> Path:
        """Return the path of a name in the first folder that has it."""
        name = name.removeprefix("file://")
        roots = [self._folder] if self._folder is not None else folders
        own = find_contained(roots[0], name)
        others = [root / spelling for spelling in spellings(name) for root in roots[1:]]
        return next((path for path in (own, *others) if is_file(path)), own)


def image_name(image: Image) -> str:
    """Return the name that identifies an image in its source; empty for bytes without a name."""
    return "" if isinstance(image, StoredImage) or _DATA_URI.match(image) else image


def describe_image(image: Image, role: str) -> str:
    """Return the words for an image in a message: its column, or its role and its name."""
    return image.column if isinstance(image, StoredImage) else f"{role} ({shorten_name(image)})"


def shorten_name(name: str) -> str:
    """Return a path or data URI of at most 60 characters, for messages."""
    return name if len(name) <= 60 else f"{name[:57]}..."


def decode_uri(uri: str) -> bytes:
    """Return the bytes of a data URI such as "data:image/png;base64,iVBO...".

    Raises:
        UnusableRowError: it is too large, or not base64.
    """
    head, _, data = uri.partition(",")
    if len(data) > MAX_IMAGE_BYTES:
        raise UnusableRowError(
            f"the data URI {shorten(uri)} has {len(data):,} characters, more than {MAX_IMAGE_BYTES:,}"
        )
    if not head.lower().endswith(";base64"):
        raise UnusableRowError(f"the data URI {shorten(uri)} is not in base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableRowError(f"the data URI {shorten(uri)} is not base64 ({error})") from error


def spellings(name: str) -> list[str]:
    """Return a path as it is, without the separators of Windows, and with its accents in either form of Unicode."""
    local = name.replace("\\", "/")
    return list(dict.fromkeys((name, local, *(unicodedata.normalize(form, local) for form in ("NFC", "NFD")))))


def find_contained(folder: Path, name: str, location: str = "") -> Path:
    """Return the path in a folder of the first spelling of a name that is a file there; errors as `contained_path`."""
    paths = [contained_path(folder, spelling, location) for spelling in spellings(name)]
    return next((path for path in paths if is_file(path)), paths[0])


def contained_path(folder: Path, name: str, location: str = "") -> Path:
    """Return the path of a name in a folder; rows come from strangers and must not name other files.

    Links are not followed: those in the folder are its owner's.

    Raises:
        UnusableRowError: the name leads out of the folder; the message begins with `location`, if given.
    """
    path = folder / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise UnusableRowError(
            f"{location}{': ' if location else ''}the image {shorten(name)} is outside {folder}; move it there, or "
            "name a folder that holds all images (data.images, prepare.source.images, evaluate.images)"
        )
    return path


def is_file(path: Path) -> bool:
    """Return whether a file exists, also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False
