"""Tables on disk or on the Hub, memory-mapped: Parquet, Arrow and folders of `save_to_disk`.

Rows come with their images as `StoredImage`, which reads the bytes on access.
"""

from __future__ import annotations

import bisect
import glob
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.formats.files import Record
from mmalign.data.formats.image_files import StoredImage
from mmalign.data.formats.rows import SourceRow
from mmalign.data.pairs import SkippedRow
from mmalign.reading import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array, ChunkedArray, DataType, Schema, Table

TABLES = (".parquet", ".arrow")
_ARROW_FILE = b"ARROW1"  # first bytes of Arrow's other format, which pandas and polars write as Feather
BATCH = 2048  # rows that are read at a time

RowStarts = list[tuple[int, str]]  # (first row, name) of every file


class TableRows:
    """Rows of a table.

    Attributes:
        columns: the names of its columns.

    Args:
        table: a memory-mapped datasets.Dataset with undecoded images.
        starts: (first row, name) of every file.
        folder: the folder of image paths; None for the Hub.
    """

    def __init__(self, table: Dataset, starts: RowStarts, folder: Path | None) -> None:
        self._table, self._starts = table, starts
        self._folders = (folder,) if folder is not None else ()
        fields = {field.name: field.type for field in table.data.schema}
        self._images = [name for name, kind in fields.items() if is_image(_item_type(kind) or kind)]
        self.columns = tuple(fields)
        self._texts = table.select_columns([name for name in fields if name not in self._images])

    def __len__(self) -> int:
        return len(self._table)

    def row(self, number: int) -> SourceRow:
        """Return the row of that number."""
        row = self._read(number, 1)[0]
        assert isinstance(row, SourceRow), "an indexed row can be read"
        return row

    def __iter__(self) -> Iterator[SourceRow | SkippedRow]:
        for start in range(0, len(self), BATCH):
            yield from self._read(start, min(BATCH, len(self) - start))

    def _read(self, start: int, length: int) -> list[SourceRow | SkippedRow]:
        # Texts of the rows at once; a reason stands for a row with a broken one
        texts = self._texts.data.fast_slice(start, length) if self._texts.column_names else None
        records = [dict[str, object]() for _ in range(length)] if texts is None else _records(texts)
        # True stands for an image's bytes, which are read on access
        for name in self._images:
            values = _image_values(self._table.data.column(name).slice(start, length))
            for number, (record, value) in enumerate(zip(records, values, strict=True), start):
                if value is True and type(record) is dict:
                    record[name] = StoredImage((number, name, None), name, self._cell)
                elif not isinstance(record, str):
                    record[name] = self._stored(number, name, value)
        # Locations by file and row of the file
        rows = list[SourceRow | SkippedRow]()
        for record, location in zip(records, locate_rows(self._starts, start), strict=False):
            if isinstance(record, str):
                rows.append(SkippedRow(location, record))
            else:
                rows.append(SourceRow(location, record, self._folders))
        return rows

    def _stored(self, number: int, name: str, value: object) -> object:
        """Return what a cell without bytes holds: a path, None, or a list of these and of images in the table."""
        if isinstance(value, list):
            return [
                StoredImage((number, name, index), name, self._cell) if one is True else one
                for index, one in enumerate(value)
            ]
        return value

    def _cell(self, place: tuple[int, str, int | None]) -> bytes:
        """Return the bytes of an image by its row, its column and its index in a list."""
        number, column, index = place
        # Of this column alone: the row may have further images, and sounds or videos that datasets would decode
        value = self._table.data.fast_slice(number, 1).column(column)[0].as_py()
        if index is not None:
            value = value[index]
        data = value["bytes"] if isinstance(value, dict) else value
        return bytes(data) if data is not None else b""


def _without_decimals(table: Table) -> Table:
    """Return a table whose decimals, as databases write ratings and votes, are floats."""
    import pyarrow as pa

    def plain(kind: DataType) -> DataType:
        if pa.types.is_list(kind):
            return pa.list_(plain(kind.value_type))
        return pa.float64() if pa.types.is_decimal(kind) else kind

    kinds = [plain(field.type) for field in table.schema]
    return table if kinds == table.schema.types else table.cast(pa.schema(zip(table.column_names, kinds, strict=True)))


def _records(texts: Table) -> list[dict[str, Any] | str]:
    """Return the rows of a small table; a reason in place of one with a text that is not UTF-8."""
    # The fast way, for a table without a broken text
    texts = _without_decimals(texts)
    try:
        return list(texts.to_pylist())
    except UnicodeDecodeError:
        pass
    # Cell by cell, to find the broken ones
    records = list[dict[str, Any] | str]()
    for number in range(len(texts)):
        record, name = dict[str, Any](), ""
        try:
            for name in texts.column_names:
                record[name] = texts.column(name)[number].as_py()
            records.append(record)
        except UnicodeDecodeError as error:
            records.append(f"{name} is not in UTF-8 (byte 0x{error.object[error.start]:02x})")
    return records


def _image_values(column: ChunkedArray) -> Iterator[object]:
    """Yield for each row whether it has bytes (True), the path of an image without bytes, or None; lists of these."""
    for chunk in column.chunks:
        if _item_type(chunk.type) is None:
            yield from _presence(chunk)
            continue
        # The values of a list are sliced, not copied
        offsets, present = chunk.offsets.to_pylist(), chunk.is_valid().to_pylist()
        values = _presence(chunk.values.slice(offsets[0], offsets[-1] - offsets[0]))
        for row, valid in enumerate(present):
            yield values[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]] if valid else None


def _presence(array: Array) -> list[object]:
    import pyarrow.types as pt

    present = array.is_valid().to_pylist()
    if not pt.is_struct(array.type):
        return [valid or None for valid in present]
    # Structs have bytes, or else a path
    stored = array.field("bytes").is_valid().to_pylist()
    names = {array.type.field(n).name for n in range(array.type.num_fields)}
    paths = array.field("path").to_pylist() if "path" in names else [None] * len(array)
    rows = zip(present, stored, paths, strict=True)
    return [(True if has_bytes else path) if valid else None for valid, has_bytes, path in rows]


def _item_type(kind: DataType) -> DataType | None:
    """Return the type of a list's items; None for other types."""
    import pyarrow.types as pt

    return kind.value_type if pt.is_list(kind) or pt.is_large_list(kind) else None


def is_image(kind: DataType) -> bool:
    """Return whether a column holds encoded images: bytes, or structs of bytes and perhaps a path."""
    import pyarrow.types as pt

    def is_bytes(kind: DataType) -> bool:
        return bool(pt.is_binary(kind) or pt.is_large_binary(kind))

    if not pt.is_struct(kind):
        return is_bytes(kind)
    types = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)}
    data, path = types.get("bytes"), types.get("path")
    is_name = path is None or pt.is_string(path) or pt.is_large_string(path) or pt.is_null(path)
    return data is not None and (is_bytes(data) or pt.is_null(data)) and is_name


def locate_rows(starts: Sequence[tuple[int, str]], number: int) -> Iterator[str]:
    """Yield the file of a table's row and the row's index in the file, counted from 0, from row `number` on."""
    at = bisect.bisect_right(starts, number, key=lambda s: s[0])
    for (first, name), (end, _) in zip(starts[at - 1 :], [*starts[at:], (sys.maxsize, "")], strict=True):
        yield from (f"{name}: row {index}" for index in range(max(number - first, 0), end - first))


# -------------------------------------------------------------------------------------------------------------- loading


def read_schema(file: Path) -> Schema:
    """Return the schema of a Parquet or Arrow file.

    Raises:
        ValueError: the file is not of its kind, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".arrow":
            with pa.memory_map(str(file)) as stream:
                if stream.read(len(_ARROW_FILE)) == _ARROW_FILE:
                    raise ValueError(f"data.path: {file} is a Feather file, none of save_to_disk; save it as Parquet")
                stream.seek(0)
                return pa.ipc.open_stream(stream).schema
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow file of save_to_disk" if file.suffix.lower() == ".arrow" else "Parquet file"
        raise ValueError(f"data.path: {file} is not a readable {kind} ({error}); download or write it again") from error


def read_sample(file: Path, number: int) -> list[Record]:
    """Return the first rows of a Parquet or Arrow file, with True in place of each image.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # True stands for an image, whose bytes are not read
    schema = read_schema(file)
    images = {f.name: [True] if _item_type(f.type) else True for f in schema if is_image(_item_type(f.type) or f.type)}
    texts = [name for name in schema.names if name not in images]
    if not texts:
        return [images] if _num_rows(file) else []
    # The first rows of the first batch, without the images' columns
    try:
        if file.suffix.lower() == ".arrow":
            with pa.memory_map(str(file)) as stream:
                batch = next(iter(pa.ipc.open_stream(stream)), None)
                rows = _records(pa.Table.from_batches([batch.slice(0, number).select(texts)])) if batch else []
        else:
            batch = next(pq.ParquetFile(file).iter_batches(number, columns=texts), None)
            rows = _records(pa.Table.from_batches([batch])) if batch else []
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.path: {file} is damaged ({first_line(error)}); download or write it again") from error
    return [row | images for row in rows if isinstance(row, dict)]


def load_tables(path: str, files: Sequence[Path], columns: Collection[str] | None) -> TableRows:
    """Load Parquet or Arrow files as one memory-mapped table; `columns` None takes all columns.

    A column that a file lacks is empty in its rows.

    Raises:
        ValueError: the files have no rows, have different types, or cannot be copied to the datasets cache.
    """
    from datasets import concatenate_datasets

    schemas = [(file, read_schema(file)) for file in files]
    # `starts` has the first row of each file, for the locations of rows
    tables, starts, first = list[Any](), RowStarts(), 0
    try:
        # Files with one schema are one table
        for schema, same_schema in groupby(schemas, key=lambda pair: pair[1].remove_metadata()):
            group = [file for file, _ in same_schema]
            needed = [name for name in schema.names if columns is None or name in columns]
            lengths = [_num_rows(file) for file in group]
            if not needed or not any(lengths):
                continue
            # Empty files have no rows to locate
            for file, length in zip(group, lengths, strict=True):
                if length:
                    starts.append((first, str(file.relative_to(path)) if Path(path).is_dir() else file.name))
                    first += length
            tables.append(_load(group, needed))
        if first:
            table = concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file datasets and pyarrow raise half a dozen kinds of error
        raise _loading_error(path, error) from error
    if not first:
        raise ValueError(f"data.path: {path} has no rows; expected one a pair")
    return TableRows(table, starts, Path(path) if Path(path).is_dir() else files[0].parent)


def _num_rows(file: Path) -> int:
    import pyarrow.parquet as pq
    from datasets import Dataset

    return len(Dataset.from_file(str(file))) if file.suffix.lower() == ".arrow" else pq.read_metadata(file).num_rows


def _load(files: Sequence[Path], columns: list[str]) -> Dataset:
    """Return the table of files of one schema."""
    from datasets import Dataset, concatenate_datasets, load_dataset

    if files[0].suffix.lower() == ".arrow":
        tables = [Dataset.from_file(str(file)).select_columns(columns) for file in files]
        return _undecoded(concatenate_datasets(tables))
    # A single split, whatever the files' names. Only the needed columns are copied to the memory map.
    names = [glob.escape(str(file)) for file in files]  # datasets reads brackets as a pattern
    return _undecoded(load_dataset("parquet", data_files={"train": names}, split="train", columns=columns))


def _loading_error(path: str, error: Exception) -> ValueError:
    from datasets import config
    from datasets.exceptions import DatasetGenerationError

    # datasets wraps the error that tells more
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    if isinstance(cause, OSError):  # a damaged Parquet page, or a full disk
        return ValueError(
            f"data.path: {path} could not be copied to {config.HF_DATASETS_CACHE}, to be mapped "
            f"({first_line(cause)}); check that the file is complete, and free disk space there or set "
            "HF_DATASETS_CACHE to another folder"
        )
    return ValueError(
        f"data.path: {path} could not be read as one table ({first_line(cause)}); its files must have the same types"
    )


def load_hub(path: str, split: str | None) -> TableRows:
    """Load a dataset of the Hub as a memory-mapped table.

    Args:
        path: its id, perhaps with a configuration: `owner/name:configuration`.
        split: the split; None takes "train".

    Raises:
        ValueError: the dataset does not exist, access is denied, or it has several configurations and none is named.
    """
    from datasets import load_dataset

    name, (dataset, _, configuration) = split or "train", path.partition(":")
    try:
        table = load_dataset(dataset, configuration or None, split=name)
    except MemoryError:
        raise
    except Exception as error:  # also RuntimeError for a dataset that is a script, and errors of its builder
        raise ValueError(
            f"data.path: {path} is not a local file and could not be loaded from the Hub, split {name!r} ({error}); "
            "expected a file, a folder, or a Hub id that you may read; one of several configurations is named as "
            "owner/name:configuration"
        ) from error
    return TableRows(_undecoded(table), [(0, f"{path} ({name})")], None)


def _undecoded(table: Dataset) -> Dataset:
    """Return the table with images as bytes, even if its metadata asks for decoding."""
    from datasets import Image, List

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table
