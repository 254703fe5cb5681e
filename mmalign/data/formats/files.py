"""Readers of Parquet, Hub and JSON rows, with the location of every row."""

from __future__ import annotations

import bisect
import codecs
import glob
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.reading import check_file, first_line, parse_json, read_json
from mmalign.resources import is_hub_id, resolve

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType, Schema

TABLES = (".parquet",)
JSON = (".json", ".jsonl")
MAX_LINE = 2**26  # 64 MiB; the bytes of a line of JSON
SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
MAX_IMAGE_BYTES = 2**29  # 512 MiB; no encoded image of usable size is larger

Record = Mapping[str, object]  # a row of JSON or of a table
RowStarts = list[tuple[int, str]]  # (first row, name) of every file


def is_hub_path(path: str) -> bool:
    """Check whether a path names a dataset on the Hub."""
    # A local folder "owner" means that a file was meant. A typo in its name must not cause a download.
    return is_hub_id(path) and not Path(path).parent.exists()


def find_files(path: str, split: str | None, suffixes: Sequence[str]) -> list[Path]:
    """Return the files that a path matches, sorted; tables are also searched for in subfolders.

    Args:
        path: a file, a folder or a glob.
        split: the start of the files' names, or the name of their folder; None takes all files of a single split. In a
            folder without splits it has no meaning.
        suffixes: the suffixes of the files in a folder.

    Raises:
        ValueError: no file matches, or a folder has files of several splits and none is named.
    """
    folder, tables = Path(path), set(suffixes) & set(TABLES)
    if folder.is_file():
        return [folder]
    if folder.is_dir():
        files = [*folder.rglob("*")] if tables else [*folder.iterdir()]
        files = sorted(f for f in files if f.suffix in suffixes and f.is_file())
    else:
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file())
    if not files:
        expected = " or ".join(f"*{s}" for s in suffixes)
        came = (
            "has no such file" if folder.is_dir() else "matches no file" if glob.has_magic(path) else "does not exist"
        )
        hub = ", or a Hub id (owner/name)" if tables else ""
        raise ValueError(f"data.path: {path} {came}; expected {expected}, a folder of them, or a glob{hub}")
    return files if split is None and not folder.is_dir() else _of_split(path, files, split)


def _of_split(path: str, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of a split, by their names or folders; all files of a folder without splits."""
    names = sorted({name for f in files for name in SPLIT_NAMES if _is_of_split(f, name)})
    if split is None:
        if len(names) > 1:
            raise ValueError(f"data.split: {path} has files of several splits; expected one of {', '.join(names)}")
        return files
    of_split = [f for f in files if _is_of_split(f, split)]
    if not of_split and names:
        raise ValueError(f"data.split: {path} has no file of split {split!r}; expected one of {', '.join(names)}")
    return of_split or files


def _is_of_split(file: Path, split: str) -> bool:
    return bool(re.match(rf"{re.escape(split)}([-_.]|$)", file.name)) or file.parent.name == split


# --------------------------------------------------------------------------------------------------------------- tables


def locate_row(starts: Sequence[tuple[int, str]], number: int, column: str = "") -> str:
    """Return the file of a table's row, the row's index in the file, counted from 0, and the column."""
    first, name = starts[bisect.bisect_right(starts, number, key=lambda s: s[0]) - 1]
    return f"{name}: row {number - first}" + (f", {column}" if column else "")


def read_schema(file: Path) -> Schema:
    """Return the schema of a Parquet file.

    Raises:
        ValueError: the file is not a Parquet file, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"data.path: {file} is not a readable Parquet file ({error}); download or write it again"
        ) from error


def load_tables(path: str, files: Sequence[Path], columns: Collection[str | None] | None) -> tuple[Dataset, RowStarts]:
    """Load Parquet files as one memory-mapped table with undecoded images; `columns` None takes all columns.

    Raises:
        ValueError: the files have no rows, have different schemas, or cannot be copied to the datasets cache.
    """
    import pyarrow.parquet as pq
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetGenerationError

    starts, row = RowStarts(), 0
    for file in files:
        read_schema(file)
        if rows := pq.read_metadata(file).num_rows:
            starts.append((row, str(file.relative_to(path)) if Path(path).is_dir() else file.name))
            row += rows
    if not row:
        raise ValueError(f"data.path: {path} has no rows; expected one a pair")
    needed = [n for n in pq.read_schema(files[0]).names if columns is None or n in columns]
    try:
        # A single split, whatever the files' names. Only the needed columns are copied to the memory map.
        table = load_dataset("parquet", data_files={"train": [str(f) for f in files]}, split="train", columns=needed)
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file datasets and pyarrow raise half a dozen kinds of error
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, OSError):  # a damaged Parquet page, or a full disk
            raise ValueError(
                f"data.path: {path} could not be copied to {config.HF_DATASETS_CACHE}, to be mapped "
                f"({first_line(cause)}); check that the file is complete, and free disk space there or set "
                "HF_DATASETS_CACHE to another folder"
            ) from error
        raise ValueError(
            f"data.path: {path} could not be read as one table ({first_line(cause)}); its files must agree"
        ) from error
    return _undecoded(table), starts


def is_text(kind: DataType) -> bool:
    """Return whether a column holds texts."""
    import pyarrow.types as pt

    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def is_image(kind: DataType) -> bool:
    """Return whether a column holds encoded images: bytes, or structs of bytes and perhaps a path."""
    import pyarrow as pa
    import pyarrow.types as pt

    def is_bytes(kind: DataType) -> bool:
        return bool(pt.is_binary(kind) or pt.is_large_binary(kind))

    if not pt.is_struct(kind):
        return is_bytes(kind)
    types = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)}
    path = types.get("path", pa.null())
    return (
        "bytes" in types
        and (is_bytes(types["bytes"]) or pt.is_null(types["bytes"]))
        and (is_text(path) or pt.is_null(path))
    )


def load_hub(path: str, split: str | None) -> tuple[Dataset, RowStarts]:
    """Load a dataset of the Hub as a memory-mapped table with undecoded images.

    Raises:
        ValueError: the dataset does not exist, or access is denied.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = split or "train"
    try:
        table = load_dataset(path, split=name)
    except (DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise ValueError(
            f"data.path: {path} is not a local file and could not be loaded from the Hub, split {name!r} ({error}); "
            "expected a parquet file, a folder of them, or a Hub id that you may read"
        ) from error
    return _undecoded(table), [(0, f"{path} ({name})")]


def _undecoded(table: Dataset) -> Dataset:
    """Return the table with images as bytes, even if its metadata asks for decoding."""
    from datasets import Image, List

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


# ----------------------------------------------------------------------------------------------------------------- JSON


def records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Yield (location, record) for every record of a JSON list or of JSON lines, numbered from 1.

    JSON lines are recognized in files of any name. Captioning toolkits write a dictionary {"imgToEval": {id: record}};
    its inner records are yielded.

    Raises:
        ValueError: the file cannot be read, is neither JSON nor JSON lines, or has a record that is not {...}.
    """
    file = resolve(path)
    try:
        check_file(file, None)
        with file.open("rb") as stream:
            is_list = stream.read(256).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        located = _lines(file) if file.suffix == ".jsonl" and not is_list else _entries(file, is_list)
        for location, record in located:
            if not isinstance(record, dict):
                raise ValueError(f"{location} is {shorten(record)}; expected a record {{...}}")
            yield location, record
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected JSON, or JSON lines, in UTF-8") from error


def _entries(file: Path, is_list: bool) -> Iterator[tuple[str, object]]:
    """Yield the records of a JSON file; read it as JSON lines if it is not valid JSON and not a list."""
    try:
        check_file(file)
        content = parse_json(file.read_bytes())
    except ValueError as error:
        if is_list:
            raise ValueError(f"{file.name} is not JSON ({error}); expected a list of records [{{...}}]") from error
        yield from _lines(file)
        return
    if isinstance(content, dict) and isinstance(content.get("imgToEval"), dict):
        yield from ((f"{file.name}: imgToEval {key}", record) for key, record in content["imgToEval"].items())
        return
    entries = [content] if isinstance(content, dict) else content  # JSON lines with a single line
    if not isinstance(entries, list):
        raise ValueError(
            f"{file.name} is {shorten(content)}; expected a list of records [{{...}}], or one record a line"
        )
    yield from ((f"{file.name}: entry {number}", record) for number, record in enumerate(entries, start=1))


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    with file.open("rb") as lines:  # bytes, since a truncated file may end inside a character
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            if line.strip():
                location = f"{file.name}: line {number}"
                try:
                    if len(line) > MAX_LINE:
                        raise ValueError(f"more than {MAX_LINE:,} bytes")
                    yield location, parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{location} is not JSON ({error}); expected one record {{...}} a line") from error


def document(path: str | Path) -> dict[str, object]:
    """Read a file that holds one JSON dictionary.

    Raises:
        ValueError: the file cannot be read, or its content is not a JSON dictionary.
    """
    file, expected = resolve(path), "expected one dictionary {...}"
    content = read_json(file, expected, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is {shorten(content)}; {expected}")
    return content


def find_image(file: Path, name: object, location: str, folder: Path | None = None) -> str:
    """Return the path of a record's image, in `folder` or else beside the file; empty if it does not exist.

    Raises:
        ValueError: the name is not a text or leads out of the folder, or the file is too large.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"{location}: {shorten(name)} is not an image; expected a path relative to {folder or file.name}"
        )
    if folder is not None:
        candidates = [contained_path(folder, name, location)]
    else:
        candidates = [contained_path(file.parent, name, location), file.parent / file.stem / name]
    path = next((c for c in candidates if is_file(c)), None)
    if path is None:
        return ""
    try:
        check_file(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise ValueError(f"{location}: the image {shorten(name)} cannot be read ({error.strerror})") from error
    return str(path)


def contained_path(folder: Path, name: str, location: str) -> Path:
    """Return the path of a name in a folder; rows come from strangers and must not name other files.

    Links are not followed: those in the folder are its owner's.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = folder / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(
            f"{location}: the image {shorten(name)} is outside {folder}; move it there, or name a folder "
            "that holds all images (data.images, prepare.source.images, evaluate.images)"
        )
    return path


def is_file(path: Path) -> bool:
    """Return whether a file exists, also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False


def as_text(value: object) -> str:
    """Return a value of any type as text, such as the name of a group."""
    try:
        return str(value)
    except RecursionError:
        return shorten(value)


def shorten(value: object) -> str:
    """Return a value as JSON of at most 60 characters, for messages."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:  # as deep as JSON may be where it is read, too deep where it is written
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
