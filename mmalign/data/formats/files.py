"""Files of rows: tables (parquet, the Hub) that are mapped, and JSON that is read; with where every row stands."""

from __future__ import annotations

import bisect
import codecs
import glob
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmalign.resources import is_hub_id, resolve

TABLES = (".parquet",)
JSON = (".json", ".jsonl")

RowStarts = list[tuple[int, str]]  # the first row of every file, and its name


def is_hub_path(path: str) -> bool:
    """Whether a path means a dataset on the Hub."""
    # Where the folder "owner" is here, a file was meant, and a slip in its name must not send us to the Hub.
    return is_hub_id(path) and not Path(path).parent.exists()


def find_files(path: str, split: str | None, suffixes: Sequence[str]) -> list[Path]:
    """The files that a path means, sorted; in a folder tables may lie deeper.

    Args:
        path: a file, a folder or a glob.
        split: files whose name begins with it or that lie in a folder of that name; None takes all.
        suffixes: of the files that are meant.

    Raises:
        ValueError: there are none.
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
    if split is None:
        return files
    of_split = [f for f in files if re.match(rf"{re.escape(split)}([-_.]|$)", f.name) or f.parent.name == split]
    if not of_split:
        examples = ", ".join(f.name for f in files[:5])
        raise ValueError(
            f"data.split: {path} has no file of split {split!r} (found {examples}); name one that is there"
        )
    return of_split


# --------------------------------------------------------------------------------------------------------------- tables


def locate_row(starts: Sequence[tuple[int, str]], number: int) -> str:
    """The file of a table's row and, counted from 0, its row there."""
    first, name = starts[bisect.bisect_right(starts, number, key=lambda s: s[0]) - 1]
    return f"{name}: row {number - first}"


def read_schema(file: Path) -> Any:
    """The columns of a parquet file.

    Raises:
        ValueError: it is none, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"data.path: {file} is no readable parquet file ({error}); download or write it anew"
        ) from error


def load_tables(path: str, files: Sequence[Path], columns: Collection[str | None] | None) -> tuple[Any, RowStarts]:
    """Parquet files as one mapped table, images undecoded; None takes all columns.

    Raises:
        ValueError: they have no rows, do not agree, or cannot be copied to the map.
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
        # One split of ours, whatever the files are called; only what is needed is copied to the memory map.
        table = load_dataset("parquet", data_files={"train": [str(f) for f in files]}, split="train", columns=needed)
    except DatasetGenerationError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        if isinstance(error.__cause__, OSError):  # a page of the parquet is damaged, or the disk is full
            raise ValueError(
                f"data.path: {path} could not be copied to {config.HF_DATASETS_CACHE}, to be mapped ({cause}); "
                "see whether the file is whole, and make room there or set HF_DATASETS_CACHE to another folder"
            ) from error
        raise ValueError(f"data.path: {path} could not be read as one table ({cause}); its files must agree") from error
    return _undecoded(table), starts


def load_hub(path: str, split: str | None) -> tuple[Any, RowStarts]:
    """A dataset of the Hub as a mapped table, images undecoded.

    Raises:
        ValueError: it is not there, or may not be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = split or "train"
    try:
        table = load_dataset(path, split=name)
    except (DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise ValueError(
            f"data.path: {path} is no file here and could not be loaded from the Hub, split {name!r} ({error}); "
            "expected a parquet file, a folder of them, or a Hub id that you may read"
        ) from error
    return _undecoded(table), [(0, f"{path} ({name})")]


def _undecoded(table: Any) -> Any:
    """With images as bytes, whatever the file's metadata say of them."""
    from datasets import Image, List

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


# ----------------------------------------------------------------------------------------------------------------- JSON


def records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every record of a JSON list, or of JSON lines, with its location (numbered from 1).

    JSON lines are recognized in files of any name. In a dictionary {"imgToEval": {id: record}}, as captioning toolkits
    write it, the records are the inner ones.

    Raises:
        ValueError: there is no such file, it is neither JSON nor JSON lines, or a record is no {...}.
    """
    file = resolve(path)
    try:
        with file.open("rb") as stream:
            is_list = stream.read(256).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        located = _lines(file) if file.suffix == ".jsonl" and not is_list else _entries(file, is_list)
        for location, record in located:
            if not isinstance(record, dict):
                raise ValueError(f"{location} is {shorten(record)}; expected a record {{...}}")
            yield location, record
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); expected JSON, or JSON lines, in UTF-8") from error


def _entries(file: Path, is_list: bool) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file of JSON; of JSON lines if it is not JSON as a whole, and no list."""
    try:
        content = json.loads(file.read_bytes())
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


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:  # bytes, since a truncated file may end inside a character
        for number, line in enumerate(lines, start=1):
            if line.strip():
                location = f"{file.name}: line {number}"
                try:
                    yield location, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{location} is not JSON ({error}); expected one record {{...}} a line") from error


def document(path: str | Path) -> dict[str, Any]:
    """Read a file that is one JSON dictionary.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    file = resolve(path)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected one dictionary {{...}}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is {shorten(content)}; expected one dictionary {{...}}")
    return content


def find_image(file: Path, name: Any, location: str, folder: Path | None = None) -> str:
    """The path of an image that a record of a file names, in `folder` or beside the file; empty if it does not exist.

    Raises:
        ValueError: the record names none.
    """
    if not isinstance(name, str):
        raise ValueError(f"{location}: {shorten(name)} is no image; expected a path relative to {folder or file.name}")
    candidates = [folder / name] if folder is not None else [file.parent / name, file.parent / file.stem / name]
    return next((str(c) for c in candidates if c.is_file()), "")


def shorten(value: Any) -> str:
    """A value in short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
