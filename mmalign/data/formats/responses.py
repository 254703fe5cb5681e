"""Formats of vision-language response pairs: trl, povid, realign, mdpo, rlhfv, swift and answers.

trl      `images` (a list) or `image`, `prompt`, `chosen`, `rejected`: texts, or lists of messages. Without `prompt`,
         the prompt is the shared start of both lists. `hallucinated` may hold a second rejected response.
povid    `image`, `conversations` and `rejected_conversations` (messages with `from` and `value`); arXiv:2402.11411.
realign  `image`, `retrieved_image`, `chosen` and `rejected` (messages); arXiv:2502.13146.
mdpo     `img_path`, `prompt` ("USER: <image> ... ASSISTANT:" as a whole), `chosen`, `rejected`; arXiv:2406.11839.
rlhfv    `image`, `question`, `chosen`, `rejected`, or the last three as JSON in `text`; arXiv:2312.00849, 2405.17220.
swift    `images`, `messages` with the chosen response as the last, `rejected_response`, and `rejected_images` if the
         rejected response belongs to other images.
answers  `images` or `image`, `prompt` and `answer`; or `messages` or `conversations`, using the last answer. These are
         true answers alone; `prepare` makes pairs from them.

All are JSON, JSON lines, Parquet files or a dataset on the Hub; images are paths, bytes, or structs with bytes.
`<image>` in a prompt marks an image's position. In a prompt without it the images come first. `columns` maps a name
above to the name in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.conversations import LAYOUTS, ParsedRow
from mmalign.data.formats.files import (
    MAX_IMAGE_BYTES,
    TABLES,
    Record,
    as_text,
    contained_path,
    find_files,
    find_image,
    is_hub_path,
    is_image,
    load_hub,
    load_tables,
    locate_row,
    records,
)
from mmalign.data.formats.layouts import Layout, UnusableRowError, find_layout
from mmalign.data.formats.rows import ImageKeys, file_ref
from mmalign.data.pairs import ImageRef, Pairs, ResponsePair, SkippedRow, stable_hash
from mmalign.language.chat import Turn
from mmalign.reading import check_file

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType

IMAGE = "<image>"  # image placeholder in a text

Columns = Mapping[str, str]
NamedImages = tuple[tuple[str, ImageRef], ...]  # images with the names that a row id is hashed from


@dataclass(frozen=True)
class IndexedRow:
    """Usable row with its texts and the locations of its images."""

    parsed: ParsedRow
    location: str
    group: str
    number: int  # the row's index in its table
    paths: dict[str, str]  # image name -> file, for rows that name files


class ResponseRows:
    """Source of response pairs; images in a table are read when their pair is built."""

    def __init__(self, entries: Sequence[IndexedRow], table: Dataset | None = None, folder: Path | None = None) -> None:
        self._entries, self._table, self._folder, self._keys = entries, table, folder, ImageKeys()

    def pair(self, number: int) -> ResponsePair:
        """Return the pair of that number."""
        entry = self._entries[number]
        parsed, images = entry.parsed, self._images(entry)
        # Images come in order: chosen, rejected (if they differ), others
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
        """Return the groups of these pairs."""
        return [self._entries[n].group for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts of these pairs: the text of the last turn before the responses."""
        return [self._entries[n].parsed.turns[-1].text for n in numbers.tolist()]

    def _images(self, entry: IndexedRow) -> NamedImages:
        parsed, images = entry.parsed, list[tuple[str, ImageRef]]()
        for index, image in enumerate(parsed.all_images):
            if isinstance(image, str):
                # Row ids use names instead of keys, so that a copy of the folder gives the same random numbers.
                locate = partial("{}, image {} ({})".format, entry.location, index, image)
                images.append((image, file_ref(self._keys, entry.paths[image], locate)))
                continue
            load = partial(_bytes, self._table, entry.number, *image, self._folder, entry.location)
            key = self._keys.of_bytes((entry.number, *image), load)
            images.append((key, ImageRef(key, partial("{}, image {}".format, entry.location, index), load)))
        return tuple(images)


def _bytes(table: Dataset, number: int, column: str, index: int | None, folder: Path | None, location: str) -> bytes:
    """Return the bytes of a table's image: the cell's, those at `index` of its list, or those of a file in `folder`.

    Raises:
        ValueError: the file is outside the folder, is not regular, or cannot be read.
    """
    value = table[number][column]
    if index is not None:
        value = value[index]
    if isinstance(value, dict):
        data, path = value["bytes"], value.get("path")
        return _file_bytes(path, folder, location) if data is None and path else bytes(data or b"")
    return bytes(value or b"")


def _file_bytes(name: str, folder: Path | None, location: str) -> bytes:
    if folder is None:
        raise ValueError(
            f"{location}: the image {name!r} is a file's path without its bytes; data.images names its folder"
        )
    path = contained_path(folder, name, location)
    try:
        check_file(path, MAX_IMAGE_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{location}: the image {name!r} cannot be read ({error.strerror or error})") from error


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
    """Index the pairs of a source: read and check its texts, without decoding its images.

    Args:
        format: a format of the module docstring.
        path: a file, a folder, a glob, or a Hub id.
        images: the folder that image paths are relative to; the file's folder if not given.
        split: the start of the files' names, or the name of their folder; on the Hub, the split ("train").
        columns: map from the format's column names to those in the files.
        group_by: the column whose groups stay on one side of a validation split; the images if not given.
        limit: the number of pairs to take from the start; None takes all.

    Raises:
        ValueError: a file or column is missing, a row does not match the format, or no pair is left.
    """
    layout = find_layout(LAYOUTS, format, columns or {})
    entries, dropped = list[IndexedRow](), list[SkippedRow]()
    folder = images
    if images is None and not is_hub_path(path):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
    table, raw_rows = _open_rows(layout, path, split)
    for location, number, file, record in raw_rows:
        layout.check_columns(location, record, group_by)
        try:
            parsed = _with_image_places(layout.read(location, record))
            paths = _paths(parsed, file, location, images, path)
        except UnusableRowError as error:
            dropped.append(SkippedRow(location, str(error), error.defect))
            continue
        # Rows of the same images stay in one split
        group = as_text(record[group_by]) if group_by is not None else _images_group(parsed, location)
        entries.append(IndexedRow(parsed, location, group, number, paths))
    pairs = Pairs(path, ResponseRows(entries, table, folder), np.arange(len(entries)), dropped)
    pairs.require("with an image and two different responses")
    return pairs[:limit] if limit is not None else pairs


def _open_rows(
    layout: Layout[ParsedRow], path: str, split: str | None
) -> tuple[Dataset | None, Iterator[tuple[str, int, Path | None, Record]]]:
    """Return the table, if there is one, and the rows: location, index in the table or -1, JSON file, and record."""
    files = [] if is_hub_path(path) else find_files(path, split, layout.suffixes)
    tables = [file for file in files if file.suffix in TABLES]
    if files and not tables:
        return None, ((where, -1, file, record) for file in files for where, record in records(file))
    table, starts = load_tables(path, tables, None) if tables else load_hub(path, split)
    return table, ((locate_row(starts, n), n, None, record) for n, record in enumerate(_light(table)))


def _light(table: Dataset) -> Iterator[Record]:
    """Yield the rows of a table with (column, index) instead of each image's bytes, which are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def is_list(kind: DataType) -> bool:
        return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))

    heavy = {f.name: f.type for f in table.data.schema if is_image(f.type.value_type if is_list(f.type) else f.type)}
    texts = table.select_columns([n for n in table.column_names if n not in heavy])
    # Count the images of each row from offsets and validity alone
    counts = {}
    for name, kind in heavy.items():
        column = table.data.column(name)
        lengths = pc.list_value_length(column) if is_list(kind) else pc.is_valid(column)
        counts[name] = lengths.to_pylist(), is_list(kind)
    for number in range(len(table)):
        row = dict(texts[number]) if texts.column_names else {}
        for name, (numbers, listed) in counts.items():
            many = numbers[number] or 0
            row[name] = [(name, index) for index in range(many)] if listed else ((name, None) if many else None)
        yield row


def _with_image_places(parsed: ParsedRow) -> ParsedRow:
    """Return the row with a placeholder for every image in its prompt.

    Raises:
        UnusableRowError: a response is empty, equal to the other or holds a placeholder, or the images do not match.
    """
    texts = {"chosen": parsed.chosen, "rejected": parsed.rejected, "hallucinated": parsed.hallucinated or None}
    for side, text in texts.items():
        if text is not None and not text.strip():
            raise UnusableRowError(f"the {side} response is empty")
        if text is not None and IMAGE in text:
            raise UnusableRowError(f"the {side} response holds {IMAGE}")
    if not parsed.images:
        raise UnusableRowError("has no image", "missing image")
    if parsed.rejected_images is not None and len(parsed.rejected_images) != len(parsed.images):
        raise UnusableRowError(f"has {len(parsed.images)} images and {len(parsed.rejected_images)} rejected ones")
    # Responses must differ, unless their images do
    same_images = parsed.rejected_images is None or parsed.rejected_images == parsed.images
    for side, text in list(texts.items())[1:]:
        if text is not None and parsed.chosen.strip() == text.strip() and same_images:
            raise UnusableRowError(f"the chosen and the {side} response are the same", "same sides")
    # Without placeholders, the images come first in the first user turn
    places = sum(turn.text.count(IMAGE) for turn in parsed.turns)
    if places == len(parsed.images):
        return parsed
    if places:
        raise UnusableRowError(f"{places} image placeholders in the prompt for {len(parsed.images)} images")
    first = next((n for n, turn in enumerate(parsed.turns) if turn.role == "user"), None)
    if first is None:
        raise UnusableRowError("the prompt has no user turn")
    turns = list(parsed.turns)
    turns[first] = Turn("user", IMAGE * len(parsed.images) + turns[first].text)
    return parsed.with_turns(tuple(turns))


def _paths(parsed: ParsedRow, file: Path | None, location: str, images: Path | None, source: str) -> dict[str, str]:
    """Return the files of a row's images by name.

    Raises:
        UnusableRowError: a file does not exist.
    """
    paths = dict[str, str]()
    for image in parsed.all_images:
        if isinstance(image, tuple):
            continue
        if file is None and images is None:
            images = Path(source).parent if Path(source).is_file() else Path(source)
        paths[image] = find_image(file or Path(source), image, location, images)
    absent = [name for name, text in paths.items() if not text]
    if absent:
        raise UnusableRowError(f"{' and '.join(absent)} does not exist", "missing image")
    return paths


def _images_group(parsed: ParsedRow, location: str) -> str:
    """Return the group of a row: its image names, or its location if the images have no names (tables)."""
    names = [image for image in parsed.images if isinstance(image, str)]
    return " ".join(names) if names else location
