"""Webdataset tars: members of one name up to its first dot are a row, and the rest of the name is the column.

`17.chosen.jpg`, `17.rejected.jpg` and `17.txt` are the row 17 with chosen, rejected and prompt. `17.json` adds keys.
Nothing is unpacked: images are read from the archive on access.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from mmalign.data.formats.image_files import MAX_IMAGE_BYTES, SUFFIXES, StoredImage
from mmalign.data.formats.rows import SourceRow
from mmalign.data.pairs import SkippedRow, UnusableRowError
from mmalign.reading import check_file, parse_json

TARS = (".tar",)
MAX_TEXT = 2**24  # 16 MiB; the bytes of a text member

_IMAGES = ("jpg_", "jpeg_", "png_", "webp_")  # Pick-a-Pic's jpg_0 and jpg_1
_TEXTS = (".txt", ".text", ".caption", ".prompt")


def archive_rows(file: Path) -> Iterator[SourceRow | SkippedRow]:
    """Yield the rows of an archive.

    Raises:
        ValueError: the archive is damaged or compressed.
    """
    try:
        check_file(file, None)
        with tarfile.open(file, "r:") as archive:
            members = (member for member in archive if not member.isdir())
            for key, row_members in groupby(members, key=_key):
                location = f"{file.name}: {key}"
                # The values of all members of a name, such as 17.chosen.jpg and 17.txt
                record = dict[str, object]()
                try:
                    for member in row_members:
                        values = _values(file, archive, member)
                        for name in record.keys() & values.keys():
                            if record[name] != values[name]:
                                raise UnusableRowError(f"has two members for {name}; remove one")
                        record |= values
                    yield SourceRow(location, record, (file.parent,))
                except UnusableRowError as error:  # groupby goes on with the next key
                    yield SkippedRow(location, str(error), error.defect)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"data.path: {file} is not a readable tar ({error}); expected one without compression, which is complete"
        ) from error


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _values(file: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, object]:
    """Return the columns of a member: an image, a text, or the keys of a JSON record.

    Raises:
        UnusableRowError: it is a link or a device, is too large, or is not UTF-8 or JSON.
    """
    # The column is the name after its first dot, without folders
    column = member.name.rpartition("/")[2].partition(".")[2].lower()  # "chosen.jpg"
    if not member.isreg() or member.sparse is not None:
        raise UnusableRowError(f"{column} is not a regular file")
    suffix = f".{column.rpartition('.')[2]}"
    is_image = suffix in SUFFIXES
    # Images stay in the archive: their place in it is kept, and read on access
    if is_image or column.startswith(_IMAGES):
        if member.size > MAX_IMAGE_BYTES:
            raise UnusableRowError(f"{column} has {member.size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        name = (column[: -len(suffix)] or "image") if is_image else column
        return {name: StoredImage((file, member.offset_data), name, partial(_read, size=member.size))}
    # Texts and JSON are read at once, so their size is bounded
    if member.size > MAX_TEXT:
        raise UnusableRowError(f"{column} has {member.size:,} bytes, more than {MAX_TEXT:,}")
    stream = archive.extractfile(member)
    assert stream is not None, "a regular file"
    data = stream.read()
    try:
        if suffix == ".json":
            content = parse_json(data)
            return dict(content) if isinstance(content, dict) else {column: content}
        name = column[: -len(suffix)] if suffix in _TEXTS else column
        return {name or "prompt": data.decode("utf-8-sig").strip()}
    except ValueError as error:
        raise UnusableRowError(f"{column} cannot be read ({error}); expected an image, or text in UTF-8") from error


def _read(place: tuple[Path, int], size: int) -> bytes:
    file, offset = place
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
