"""Sources of rows: the files of a path, their kind, and their rows.

A path is a file, a folder, a glob or a Hub id. Kinds are Parquet, Arrow, JSON, JSON lines, CSV, TSV, webdataset tars,
and folders of better and worse images with captions.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmalign.data.formats.archives import TARS, archive_rows
from mmalign.data.formats.files import TEXTS, Record, kind_of, read_rows
from mmalign.data.formats.folders import find_sides, names_images, side_rows, thumb_rows
from mmalign.data.formats.image_files import SUFFIXES
from mmalign.data.formats.rows import ListRows, Rows, SourceRow
from mmalign.data.formats.tables import TABLES, TableRows, load_hub, load_tables, read_sample, read_schema
from mmalign.data.pairs import SkippedRow, format_rows
from mmalign.resources import is_hub_id

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
SAMPLE = 100  # rows that are read to recognize a layout
MOST = 100_000  # rows among which they are searched
KINDS = (*TABLES, *TEXTS, *TARS)
EXPECTED = "expected *.parquet, *.arrow, *.json, *.jsonl, *.csv, *.tsv or *.tar, a folder of them, or a glob"

# Files that describe a data set, and files of other kinds
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_REMEDIES = dict.fromkeys((".xls", ".xlsx", ".ods"), "save it as CSV")
_REMEDIES |= dict.fromkeys((".feather", ".orc", ".avro", ".h5", ".hdf5", ".npz"), "save it as Parquet")
_REMEDIES |= dict.fromkeys((".sqlite", ".sqlite3", ".db", ".xml"), "save its rows as JSON lines")
_REMEDIES |= dict.fromkeys((".zip", ".tgz", ".tar.gz", ".7z", ".rar"), "unpack it")
_REMEDIES |= dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), "save it as Parquet, since a pickle can run any code")


@dataclass(frozen=True)
class Source:
    """Files of a path with rows of one kind, not yet read.

    Attributes:
        path: the path that names them.
        columns: the names of their columns.
        sample: of every column the first value that is not empty in the first rows; True stands for bytes of an image.
    """

    path: str
    columns: tuple[str, ...]
    sample: Record
    _files: tuple[Path, ...] = ()
    _hub: TableRows | None = None
    _thumbs: bool = False

    def rows(self, columns: Collection[str] | None = None) -> Rows:
        """Return the rows; of a table, these columns alone are copied to the memory map.

        Raises:
            ValueError: a file cannot be read.
        """
        if self._hub is not None:
            return self._hub
        if kind_of(self._files[0]) in TABLES:
            return load_tables(self.path, self._files, columns)
        return ListRows([row for file in self._files for row in _stream(file, self._thumbs)])


def is_hub_path(path: str) -> bool:
    """Check whether a path names a dataset on the Hub, perhaps with a configuration: `owner/name:configuration`."""
    # A local folder "owner" means that a file was meant. A typo in its name must not cause a download.
    name, _, _ = path.partition(":")
    return is_hub_id(name) and not Path(name).parent.exists()


def open_source(path: str, split: str | None, *, thumbs: bool = False) -> Source:
    """Find the files of a path and read their first rows; a dataset of the Hub is loaded.

    Args:
        path: a file, a folder, a glob or a Hub id.
        split: the start of the files' names, or the name of their folder; None takes all files of a single split. In a
            folder without splits it has no meaning. On the Hub, the split ("train").
        thumbs: every image of folders of better and worse images is a row, not every two of one name.

    Raises:
        ValueError: no file matches, a file cannot be read, or a folder has files of several splits or kinds.
    """
    # A dataset of the Hub is one table
    if is_hub_path(path):
        table = load_hub(path, split)
        return Source(path, table.columns, _merge(_records(table)), _hub=table)
    files = find_files(path, split)
    # Schemas name all columns, also those that are empty in the first rows
    if kind_of(files[0]) in TABLES:
        names = dict.fromkeys(name for file in files for name in read_schema(file).names)
        sample = next((first for file in files if (first := read_sample(file, SAMPLE))), None)
        if sample is None:
            raise ValueError(f"data.path: {path} has no rows; expected one a pair")
        return Source(path, tuple(names), _merge(sample), tuple(files))
    # Texts, archives and folders have the columns of their first rows
    rows, skipped = list[SourceRow](), list[SkippedRow]()
    for row in islice((row for file in files for row in _stream(file, thumbs)), MOST):
        if isinstance(row, SkippedRow):
            skipped.append(row)
            continue
        rows.append(row)
        if len(rows) == SAMPLE:
            break
    if not rows:
        why = f"has no row that can be read ({format_rows(skipped)})" if skipped else "has no rows"
        raise ValueError(f"data.path: {path} {why}; expected one a pair")
    merged = _merge(_records(rows))
    return Source(path, tuple(merged), merged, tuple(files), _thumbs=thumbs)


def _stream(file: Path, thumbs: bool) -> Iterator[SourceRow | SkippedRow]:
    """Yield the rows of a text file, an archive, or a folder of better and worse images."""
    if file.is_dir():
        yield from (thumb_rows if thumbs else side_rows)(file)
    elif kind_of(file) in TARS:
        yield from archive_rows(file)
    else:
        folders = (file.parent, file.parent / file.stem)  # HPDv2 has the images of test.json in test/
        for location, record in read_rows(file):
            yield record if isinstance(record, SkippedRow) else SourceRow(location, record, folders)


def _records(rows: Iterable[SourceRow | SkippedRow]) -> Iterator[Record]:
    return (row.record for row in islice(rows, SAMPLE) if isinstance(row, SourceRow))


def _merge(records: Iterable[Record]) -> Record:
    """Return the first value of every column that is not empty."""
    merged = dict[str, object]()
    for record in records:
        for name, value in record.items():
            if merged.get(name) is None:
                merged[name] = value
    return merged


# -------------------------------------------------------------------------------------------------------------- finding


def find_files(path: str, split: str | None) -> list[Path]:
    """Return the files with rows of a path, sorted and of one kind; or its folders of better and worse images.

    Raises:
        ValueError: no file matches, or a folder has files of several splits or kinds.
    """
    # A file, a folder's files of the split, or a glob
    folder = Path(path)
    if folder.is_file():
        return [_known(folder)]
    if folder.is_dir():
        files = _of_split(folder, _of_folder(folder), split)
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
        files = [_known(file) for file in (_of_split(folder, files, split) if split is not None else files)]
    # Tell what is there instead of rows
    if not files:
        came = "matches no file" if glob.has_magic(path) else "does not exist"
        if folder.is_dir():
            images = sum(file.suffix.lower() in SUFFIXES for file in folder.rglob("*"))
            came = f"has {images:,} images, and no file that pairs them" if images else "has no file with rows"
            came += " (nor folders such as good/ and bad/)"
        raise ValueError(f"data.path: {path} {came}; {EXPECTED}, or a Hub id (owner/name)")
    kinds = sorted({"folder" if file.is_dir() else kind_of(file) for file in files})
    if len(kinds) > 1:
        names = ", ".join(sorted(file.name for file in files)[:6])
        raise ValueError(f"data.path: {path} has files of several kinds ({names}); name one of them, or a glob")
    return files


def _known(file: Path) -> Path:
    """Return a file whose kind is known, or that begins as JSON does."""
    remedy = next((remedy for suffix, remedy in _REMEDIES.items() if file.name.lower().endswith(suffix)), None)
    if remedy is not None:
        raise ValueError(f"data.path: {file} is not read; {remedy}: {EXPECTED}")
    return file


def _of_folder(folder: Path) -> list[Path]:
    """Return the files with rows: tables and archives at any depth, else texts in the folder, its sides, or texts.

    A text file that captions the images of two sides has no rows.
    """
    inside = [
        path for path in sorted(folder.rglob("*")) if not any(p[0] == "." for p in path.relative_to(folder).parts)
    ]
    files = [path for path in inside if kind_of(path) in KINDS and path.name not in _DESCRIPTIONS and path.is_file()]
    for kind in (*TABLES, *TARS):  # Parquet before the Arrow files that datasets caches
        if tables := [file for file in files if kind_of(file) == kind and not file.name.startswith("cache-")]:
            return tables
    splits = [path for path in inside if path.name in SPLIT_NAMES and path.parent == folder]
    sides = [place for place in (folder, *splits) if find_sides(place)]
    rows = [file for file in files if file.parent == folder and not (sides and names_images(file))]
    return rows or sides or files


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of a split, by their names or folders; all files of a folder without splits."""
    names = sorted({name for f in files for name in SPLIT_NAMES if _is_of_split(folder, f, name)})
    if split is None:
        if len(names) > 1:
            raise ValueError(f"data.split: {folder} has files of several splits; expected one of {', '.join(names)}")
        return files
    of_split = [f for f in files if _is_of_split(folder, f, split)]
    if not of_split and names:
        raise ValueError(f"data.split: {folder} has no file of split {split!r}; expected one of {', '.join(names)}")
    return of_split or files


def _is_of_split(folder: Path, file: Path, split: str) -> bool:
    parent = file.parent.name if file.parent != folder else ""
    return bool(re.match(rf"{re.escape(split)}([-_.]|$)", file.name)) or parent == split
