"""Files of questions: JSON records, or Parquet tables with the images inside.

A Parquet file has the columns of the records. Its column `image` holds encoded images (bytes, or structs of bytes and
path). The image's name is in `image_source`, as in lmms-lab's files, or else the struct's path.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.data.formats.files import Record, records, shorten
from mmalign.data.images import decode
from mmalign.data.pairs import ImageRef
from mmalign.resources import locate

_SUFFIX = ".parquet"
Located = tuple[str, Record]  # a row, and its location for messages
Place = tuple[Path, int]  # a Parquet file, and the index of a row


class EmbeddedImages:
    """Images in the rows of Parquet files, by name; reads a group of rows at a time."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[str]:
        """Yield the images' names."""
        return iter(self._places)

    def __call__(self, name: str) -> Image.Image:
        """Return an image.

        Raises:
            BadImage: the image cannot be decoded.
        """
        file, row = self._places[name]
        return decode(ImageRef(name, lambda: f"{file.name}: row {row}, {name}", lambda: _image_bytes(file, row)))


def is_table(path: str) -> bool:
    """Check whether a path names Parquet files: a file, a glob, or a folder."""
    return path.endswith(_SUFFIX) or Path(locate(path)).is_dir()


def read_rows(path: str | Path) -> tuple[list[Located], EmbeddedImages | None]:
    """Return the rows of a file of questions with their locations, and the images of Parquet files.

    Raises:
        ValueError: the file cannot be read, or an image has no name or the name of another image.
    """
    if not is_table(str(path)):
        return list(records(path)), None
    rows, places, contents = list[Located](), dict[str, Place](), dict[str, int]()
    for file in _tables(str(path)):
        for number, (row, image) in enumerate(_read_table(file)):
            location = f"{file.name}: row {number}"
            # An image is bytes, or a struct with its path
            stored = image if isinstance(image, dict) else {"bytes": image}
            name = row.get("image_source") or stored.get("path") or f"{file.stem}-{number}"
            data = stored.get("bytes")
            if not isinstance(data, bytes) or not isinstance(name, str):
                raise ValueError(f"{location}: image is {shorten(image)}; expected encoded bytes, and a name as text")
            # Rows may share an image; two images may not share a name
            if contents.setdefault(name, hash(data)) != hash(data):
                raise ValueError(f"{location}: another image is called {name}; expected a name of its own")
            places.setdefault(name, (file, number))
            rows.append((location, {**row, "image": name}))
    return rows, EmbeddedImages(places)


def _tables(path: str) -> list[Path]:
    place = Path(locate(path))
    files = place.rglob(f"*{_SUFFIX}") if place.is_dir() else map(Path, glob.glob(str(place)))
    if not (tables := sorted(files)):
        raise ValueError(f"{path} matches no file; expected *{_SUFFIX}, a folder of them, or JSON records")
    return tables


def _read_table(file: Path) -> Iterator[tuple[dict[str, Any], object]]:
    """Yield the columns of every row, and its image apart."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if "image" not in table.schema_arrow.names:
                raise ValueError(f"{file} has {shorten(table.schema_arrow.names)}; expected a column 'image'")
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    image = row.pop("image")
                    yield row, image
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable Parquet file ({error}); download or write it again") from error


@lru_cache(maxsize=2)
def _images_of_group(file: Path, group: int) -> list[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        images: list[Any] = table.read_row_group(group, columns=["image"]).column("image").to_pylist()
    return images


def _image_bytes(file: Path, row: int) -> bytes:
    import pyarrow.parquet as pq

    metadata, group = pq.read_metadata(file), 0
    # The group of the row, and the row's number in it
    while row >= metadata.row_group(group).num_rows:
        row -= metadata.row_group(group).num_rows
        group += 1
    image = _images_of_group(file, group)[row]
    return bytes(image["bytes"] if isinstance(image, dict) else image)
