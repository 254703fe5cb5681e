"""Where pairs of responses come from: the layouts that vision-language preference data have, checked before use.

trl      `images` (a list) or `image`, `prompt`, `chosen`, `rejected`: texts, or lists of messages; without `prompt`,
         what both lists of messages begin with. `hallucinated` may hold a second rejected response.
povid    `image`, `conversations` and `rejected_conversations` (messages with `from` and `value`); arXiv:2402.11411.
realign  `image`, `retrieved_image`, `chosen` and `rejected` (messages); arXiv:2502.13146.
mdpo     `img_path`, `prompt` ("USER: <image> ... ASSISTANT:" as a whole), `chosen`, `rejected`; arXiv:2406.11839.
rlhfv    `image`, `question`, `chosen`, `rejected`, or the last three as JSON in `text`; arXiv:2312.00849, 2405.17220.
swift    `images`, `messages` with the chosen response as the last, `rejected_response`, and where the rejected response
         belongs to other images, `rejected_images`.
answers  `images` or `image`, `prompt` and `answer`, or `messages` or `conversations`, whose last answer is meant: true
         answers alone, which `prepare` makes pairs of.

All are JSON, JSON lines, parquet files or a dataset on the Hub; images are paths, bytes, or structs with bytes.
`<image>` in a prompt is an image's place; a prompt without any begins with its images. `columns` maps a name above to
the one that a file has.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.conversations import ROW_FORMATS, ParsedRow, UnusableRowError
from mmalign.data.formats.files import (
    JSON,
    TABLES,
    find_files,
    find_image,
    is_hub_path,
    load_hub,
    load_tables,
    locate_row,
    records,
)
from mmalign.data.formats.rows import file_ref
from mmalign.data.pairs import ImageRef, Pairs, ResponsePair, SkippedRow, format_rows, stable_hash
from mmalign.language.chat import Turn

IMAGE = "<image>"  # an image's place in a text
SUFFIXES = (*TABLES, *JSON)

Columns = Mapping[str, str]
NamedImages = tuple[tuple[str, ImageRef], ...]  # images with the names that a row's identity is made of


@dataclass(frozen=True)
class IndexedRow:
    """A usable row: its texts, and where its images are."""

    parsed: ParsedRow
    location: str
    group: str
    number: int  # of the row in its table
    paths: dict[str, str]  # from an image's name to its file, of rows that name files


class ResponseRows:
    """Pairs of responses; images of a table are read when a pair is."""

    def __init__(self, entries: Sequence[IndexedRow], table: Any = None) -> None:
        self._entries, self._table = entries, table

    def pair(self, number: int) -> ResponsePair:
        """The pair of that number."""
        entry = self._entries[number]
        parsed, images = entry.parsed, self._images(entry)
        sides = [images[: len(parsed.images)]]
        sides.append(images[len(parsed.images) :][: len(parsed.rejected_images or ())] or sides[0])
        others = images[len(parsed.images) + len(parsed.rejected_images or ()) :]
        texts = [f"{turn.role}: {turn.text}" for turn in parsed.turns]
        rejected = parsed.rejected or ""
        row = stable_hash(*texts, parsed.chosen, rejected, *(name for side in sides for name, _ in side))
        refs = [tuple(ref for _, ref in some) for some in (*sides, others)]
        return ResponsePair(
            row,
            parsed.turns,
            parsed.chosen,
            rejected,
            refs[0],
            refs[1],
            refs[2],
            entry.location,
            entry.group,
            parsed.hallucinated,
        )

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """The groups of these pairs."""
        return [self._entries[n].group for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """The prompts of these pairs: what was said last before the responses."""
        return [self._entries[n].parsed.turns[-1].text for n in numbers.tolist()]

    def _images(self, entry: IndexedRow) -> NamedImages:
        parsed, images = entry.parsed, list[tuple[str, ImageRef]]()
        for index, image in enumerate(parsed.all_images):
            location = f"{entry.location}, image {index}"
            if isinstance(image, str):
                # By its name and not by its key, for the row: a copy of the folder must give the same numbers.
                images.append((image, file_ref(entry.paths[image], f"{location} ({image})")))
                continue
            load = partial(_bytes, self._table, entry.number, *image)
            key = f"bytes:{hashlib.blake2b(load(), digest_size=16).hexdigest()}"
            images.append((key, ImageRef(key, location, load)))
        return tuple(images)


def _bytes(table: Any, number: int, column: str, index: int | None) -> bytes:
    """The bytes of an image in a table: the column's, or of the list in it that of place `index`."""
    value = table[number][column]
    if index is not None:
        value = value[index]
    if isinstance(value, dict):
        data, path = value["bytes"], value.get("path")
        return Path(path).read_bytes() if data is None and path else bytes(data or b"")
    return bytes(value or b"")


def open_responses(
    format: str,
    path: str,
    *,
    images: Path | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    group_by: str | None = None,
    limit: int | None = None,
) -> Pairs[ResponsePair]:
    """Index a source: its texts are read and checked, its images stay where they are.

    Args:
        format: one of those above.
        path: a file, a folder, a glob, or a Hub id.
        images: the folder that images' paths begin in; beside the file, if not given.
        split: as for `mmalign.data.formats.images.open_pairs`.
        columns: the format's column names to those that the files have.
        group_by: the column whose values a hold-out keeps together; the images if not given.
        limit: keep the first that many pairs.

    Raises:
        ValueError: a file or column is missing, a row is not of the format, or no pair is left.
    """
    layout = find_row_format(format, columns or {})
    entries, dropped, table = list[IndexedRow](), list[SkippedRow](), None
    raw_rows: Iterator[tuple[str, int, Path | None, dict[str, Any]]]
    if is_hub_path(path) or _tables(path, split):
        table, starts = load_hub(path, split) if is_hub_path(path) else load_tables(path, _tables(path, split), None)
        raw_rows = ((locate_row(starts, n), n, None, row) for n, row in enumerate(_light(table)))
    else:
        raw_rows = ((w, -1, f, r) for f in find_files(path, split, SUFFIXES) for w, r in records(f))
    for location, number, file, record in raw_rows:
        _check_columns(layout, location, list(record), group_by)
        try:
            parsed = _with_image_places(layout.parse(location, layout.rename_record(record)))
            paths = _paths(parsed, file, location, images, path)
        except UnusableRowError as error:
            dropped.append(SkippedRow(location, str(error)))
            continue
        group = str(record[group_by]) if group_by is not None else _images_group(parsed, location)
        entries.append(IndexedRow(parsed, location, group, number, paths))
    if not entries:
        why = f": {format_rows(dropped)}" if dropped else ""
        raise ValueError(
            f"data.path: {path} has no pair to learn from ({len(dropped):,} rows dropped{why}); expected rows with an "
            "image and two different responses"
        )
    pairs = Pairs(path, ResponseRows(entries, table), np.arange(len(entries)), dropped)
    return pairs[:limit] if limit is not None else pairs


def check_responses(
    format: str, path: str, *, split: str | None, columns: Columns, group_by: str | None, images: Path | None
) -> None:
    """What can be known at a glance: the files are there, and the first row has the columns. The Hub is not asked.

    Raises:
        ValueError: where, what came, what was expected, what to do.
    """
    layout = find_row_format(format, columns)
    if images is not None and not images.is_dir():
        raise ValueError(f"data.images: {images} is no folder; expected the one that the images' paths begin in")
    if is_hub_path(path):
        return
    from mmalign.data.formats.files import read_schema

    for file in find_files(path, split, SUFFIXES):
        if file.suffix in TABLES:
            _check_columns(layout, str(file), read_schema(file).names, group_by)
        else:
            for location, record in records(file):
                _check_columns(layout, location, list(record), group_by)
                break
        return


def find_row_format(format: str, columns: Columns) -> Any:
    """The layout of that name, with its columns renamed.

    Raises:
        ValueError: there is none, or it has no such column.
    """
    if format not in ROW_FORMATS:
        near = difflib.get_close_matches(format, ROW_FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"data.format: {format!r} is unknown{hint} (there are {', '.join(ROW_FORMATS)})")
    return ROW_FORMATS[format].with_columns(columns)


def _check_columns(layout: Any, location: str, columns: Sequence[str], group_by: str | None) -> None:
    lacking = layout.missing_columns(columns)
    if lacking:
        raise ValueError(
            f"{location} has no {' and no '.join(repr(c) for c in lacking)} (found {', '.join(columns) or 'nothing'}); "
            f"expected the columns of data.format {layout.name}: data.columns names what is called otherwise"
        )
    if group_by is not None and group_by not in columns:
        raise ValueError(
            f"data.group_by: {location} has no {group_by!r} (found {', '.join(columns)}); name one of those"
        )


def _tables(path: str, split: str | None) -> list[Path]:
    """The parquet files that a path means, none if it means JSON."""
    return [file for file in find_files(path, split, SUFFIXES) if file.suffix in TABLES]


def _light(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table with (column, place) in the place of every image's bytes, which are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    heavy = {n: f.type for n, f in ((f.name, f) for f in table.data.schema) if _holds_bytes(f.type)}
    texts = table.select_columns([n for n in table.column_names if n not in heavy])
    counts = {}
    for name, kind in heavy.items():
        column = table.data.column(name)
        listed_ = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        counts[name] = (pc.list_value_length(column) if listed_ else pc.is_valid(column)).to_pylist(), listed_
    for number in range(len(table)):
        row = dict(texts[number]) if texts.column_names else {}
        for name, (lengths, is_list) in counts.items():
            many = lengths[number] or 0
            row[name] = [(name, index) for index in range(many)] if is_list else ((name, None) if many else None)
        yield row


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as pt

    if pt.is_list(kind) or pt.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pt.is_struct(kind):
        return int(kind.get_field_index("bytes")) >= 0
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind))


def _with_image_places(parsed: ParsedRow) -> ParsedRow:
    """The row with a place for every image in its prompt, if it can be learned from.

    Raises:
        Unusable: why it cannot.
    """
    texts = {"chosen": parsed.chosen, "rejected": parsed.rejected, "hallucinated": parsed.hallucinated or None}
    for side, text in texts.items():
        if text is not None and not text.strip():
            raise UnusableRowError(f"the {side} response is empty")
        if text is not None and IMAGE in text:
            raise UnusableRowError(f"the {side} response holds {IMAGE}")
    if not parsed.images:
        raise UnusableRowError("has no image")
    if parsed.rejected_images is not None and len(parsed.rejected_images) != len(parsed.images):
        raise UnusableRowError(f"has {len(parsed.images)} images and {len(parsed.rejected_images)} rejected ones")
    same_images = parsed.rejected_images is None or parsed.rejected_images == parsed.images
    for side, text in list(texts.items())[1:]:
        if text is not None and parsed.chosen.strip() == text.strip() and same_images:
            raise UnusableRowError(f"the chosen and the {side} response are the same")
    places = sum(turn.text.count(IMAGE) for turn in parsed.turns)
    if places == len(parsed.images):
        return parsed
    if places:
        raise UnusableRowError(f"{places} image placeholders in the prompt for {len(parsed.images)} images")
    first = next((n for n, turn in enumerate(parsed.turns) if turn.role == "user"), None)
    if first is None:
        raise UnusableRowError("nobody asks: the prompt has no turn of a user")
    turns = list(parsed.turns)
    turns[first] = Turn("user", IMAGE * len(parsed.images) + turns[first].text)
    return parsed.with_turns(tuple(turns))


def _paths(parsed: ParsedRow, file: Path | None, location: str, images: Path | None, source: str) -> dict[str, str]:
    """The files of the images that a row names.

    Raises:
        Unusable: one does not exist.
    """
    paths = dict[str, str]()
    for image in parsed.all_images:
        if isinstance(image, tuple):
            continue
        if file is None and images is None and not Path(str(image)).is_absolute():
            images = Path(source).parent if Path(source).is_file() else Path(source)
        paths[image] = find_image(file or Path(source), image, location, images)
    absent = [name for name, text in paths.items() if not text]
    if absent:
        raise UnusableRowError(f"{' and '.join(absent)} does not exist")
    return paths


def _images_group(parsed: ParsedRow, location: str) -> str:
    """Rows of the same images stay together; images of a table have no names, and each row is alone."""
    names = [image for image in parsed.images if isinstance(image, str)]
    return " ".join(names) if names else location
