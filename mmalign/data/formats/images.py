"""Formats of image preference pairs: pick_a_pic, folder and rankings.

pick_a_pic  Pick-a-Pic v2: `caption, jpg_0, jpg_1, label_0, label_1`, optionally `image_0_uid, image_1_uid,
            are_different, has_label`. A Parquet file, a folder or a glob of them, or a dataset on the Hub. Images are
            bytes, or structs with bytes. The image with the larger label is chosen; equal labels are a tie.
            An optional `rejected_caption` is the rejected image's prompt; `caption` is then the chosen one's.
folder      JSON lines `prompt, chosen, rejected`: paths of images, relative to the file. An optional `rejected_prompt`
            is the rejected image's prompt.
rankings    HPDv2: JSON or JSON lines `prompt, image_path` (a list) and `rank` (smaller is better) or `human_preference`
            (larger is better). Every two images of different rank are a pair. Paths are relative to the file, or to the
            folder beside it with the file's name (HPDv2 has the images of test.json in test/).

`columns` maps a name above to the name in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.data.formats.files import (
    JSON,
    TABLES,
    Record,
    as_text,
    find_files,
    find_image,
    is_hub_path,
    is_image,
    is_text,
    load_hub,
    load_tables,
    locate_row,
    read_schema,
    records,
    shorten,
)
from mmalign.data.formats.layouts import Layout, find_layout
from mmalign.data.formats.rows import FilePair, FileRows, TableRows
from mmalign.data.pairs import Defect, Pairs, SkippedRow

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray, DataType, Schema

Columns = Mapping[str, str]
Sides = list[tuple[str, str]]  # (chosen, rejected) images of pairs


class ParsedPairs(NamedTuple):
    """Pairs of a row: their prompt, their images' names, the rejected images' prompt or "", and the number of ties."""

    prompt: str
    sides: Sides
    rejected_prompt: str = ""
    ties: int = 0


def open_pairs(
    format: str,
    path: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    group_by: str | None = None,
    limit: int | None = None,
    prompt_pairs: str | None = None,
) -> Pairs:
    """Index the pairs of a source without decoding its images.

    Args:
        format: "pick_a_pic", "folder" or "rankings".
        path: a file, a folder, a glob, or for pick_a_pic a Hub id.
        split: the start of the files' names, or the name of their folder; on the Hub, the split ("train").
        columns: map from the format's column names (or "prompt") to those in the files.
        group_by: the column whose groups stay on one side of a validation split; the prompt if not given.
        limit: the number of pairs to take from the start; None takes all.
        prompt_pairs: text for the error message that says which methods need a prompt for the rejected image; rows
            without one are skipped. None needs no such prompt.

    Raises:
        ValueError: a file or column is missing, a row does not match the format, or no pair is left.
    """
    layout = find_layout(LAYOUTS, format, columns or {})
    open_format = _open_tables if layout.suffixes == TABLES else _open_files
    pairs = open_format(layout, path, split, group_by, prompt_pairs is not None)
    expected = "in which one image is preferred"
    if prompt_pairs is not None:
        expected = f"with a prompt for the rejected image, rejected_caption or rejected_prompt: {prompt_pairs}"
    pairs.require(expected)
    return pairs[:limit] if limit is not None else pairs


def check_source(
    format: str, path: str, *, split: str | None = None, columns: Columns | None = None, group_by: str | None = None
) -> None:
    """Check, without reading images, that the files exist and have the columns; the Hub is not contacted.

    Raises:
        ValueError: the format is unknown, or a file or column is missing.
    """
    layout = find_layout(LAYOUTS, format, columns or {})
    if layout.suffixes != TABLES:
        layout.check_files(path, split, group_by)
    elif not is_hub_path(path):
        _check_tables(layout, path, split, group_by)


# --------------------------------------------------------------------------------------------------------- pick_a_pic


def _check_tables(layout: Layout[ParsedPairs], path: str, split: str | None, group_by: str | None) -> list[Path]:
    """Return the Parquet files that a path matches, after a check of their columns."""
    files = find_files(path, split, TABLES)
    for file in files:
        _check_schema(layout, str(file), read_schema(file), group_by)
    return files


def _check_schema(layout: Layout[ParsedPairs], location: str, schema: Schema, group_by: str | None) -> None:
    import pyarrow.types as pt

    layout.check_columns(location, schema.names, group_by)

    def check(name: str, expected: str, *tests: Callable[[DataType], bool]) -> None:
        column = layout.column(name)
        kind = schema.field(column).type
        if not any(test(kind) for test in tests):
            raise ValueError(f"{location}: {column} is {kind}; expected {expected}")

    check("caption", "a prompt, as text", is_text, pt.is_null)
    for name in ("jpg_0", "jpg_1"):
        check(name, "images as bytes, or as bytes and path", is_image)
    for name in ("label_0", "label_1"):
        check(name, "a number: 1 preferred, 0 not, 0.5 a tie", pt.is_floating, pt.is_integer)
    optional = {
        "rejected_caption": ("the rejected image's prompt, as text", (is_text, pt.is_null)),
        "has_label": ("true or false", (pt.is_boolean, pt.is_null)),
        "are_different": ("true or false", (pt.is_boolean, pt.is_null)),
        "image_0_uid": ("the image's name, as text or a number", (is_text, pt.is_integer, pt.is_null)),
        "image_1_uid": ("the image's name, as text or a number", (is_text, pt.is_integer, pt.is_null)),
    }
    for name, (expected, tests) in optional.items():
        if layout.column(name) in schema.names:
            check(name, expected, *tests)


def _open_tables(
    layout: Layout[ParsedPairs], path: str, split: str | None, group_by: str | None, prompt_pairs: bool
) -> Pairs:
    names = {name: layout.column(name) for name in layout.columns}
    if is_hub_path(path):
        table, starts = load_hub(path, split)
        _check_schema(layout, f"data.path: {path}", table.features.arrow_schema, group_by)
    else:
        files = _check_tables(layout, path, split, group_by)
        table, starts = load_tables(path, files, {*names.values(), group_by})
    present = {name: column for name, column in names.items() if column in table.column_names}
    usable, chosen_is_1, skipped, ties = _read_labels(table, names, table.column_names, prompt_pairs)
    rows = TableRows(table, present, group_by or names["caption"], starts, chosen_is_1)
    dropped = [SkippedRow(locate_row(starts, row), *why) for row, why in sorted(skipped.items())]
    return Pairs(path, rows, np.flatnonzero(usable), dropped, [locate_row(starts, row) for row in ties])


def _read_labels(
    table: Dataset, names: Columns, columns: Sequence[str], prompt_pairs: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], dict[int, tuple[str, Defect]], list[int]]:
    """Read the labels: usable rows [N], rows with jpg_1 chosen [N], reasons for skipped rows, and the rows of ties.

    With `prompt_pairs`, rows without a prompt for the rejected image are skipped.
    """

    def column(name: str) -> ChunkedArray:
        return table.data.column(names[name])

    first, second = (
        np.array(column(c).to_numpy(zero_copy_only=False), dtype=np.float64) for c in ("label_0", "label_1")
    )
    reasons = dict[int, tuple[str, Defect]]()

    def drop(rows: ArrayLike, why: str, defect: Defect = "unusable") -> None:
        for row in np.flatnonzero(rows).tolist():
            reasons.setdefault(row, (why.format(first[row], second[row]), defect))

    # Skip rows with flags, labels or prompts that are unusable
    flags: list[tuple[str, str, Defect]] = [
        ("has_label", "has_label is false", "unusable"),
        ("are_different", "both images are the same", "same sides"),
    ]
    for flag, why, defect in flags:
        if names[flag] in columns:
            drop([value is False for value in column(flag).to_pylist()], why, defect)
    named = f"{names['label_0']} is {{0:g}} and {names['label_1']} is {{1:g}}"
    drop(~np.isfinite(first + second), f"{named}; expected numbers")
    with np.errstate(invalid="ignore"):
        drop((np.minimum(first, second) < 0) | (np.maximum(first, second) > 1), f"{named}; expected 0 to 1")
        drop(np.abs(first + second - 1) > 1e-6, f"{named}; expected a sum of 1")
    drop(column("caption").is_null().to_numpy(zero_copy_only=False), "has no caption")
    if prompt_pairs:
        other = names["rejected_caption"]
        prompts = column("rejected_caption").to_pylist() if other in columns else [None] * len(first)
        drop([not prompt for prompt in prompts], f"has no {other}")
    # Ties are usable labels without a preference
    sound = np.ones(len(first), dtype=bool)
    sound[list(reasons)] = False
    ties = sound & (first == second)
    return sound & ~ties, second > first, reasons, np.flatnonzero(ties).tolist()


# ------------------------------------------------------------------------------------------------- folder and rankings


def _open_files(
    layout: Layout[ParsedPairs], path: str, split: str | None, group_by: str | None, prompt_pairs: bool
) -> Pairs:
    pairs, dropped, tied = list[FilePair](), list[SkippedRow](), list[str]()
    for file in find_files(path, split, layout.suffixes):
        for location, record in records(file):
            layout.check_columns(location, record, group_by)
            row = layout.read(location, record)
            if prompt_pairs and not row.rejected_prompt:
                second = "rejected_prompt" if "rejected_prompt" in layout.columns else "second prompt"
                dropped.append(SkippedRow(location, f"has no {layout.column(second)}"))
                continue
            tied += [location] * row.ties
            group = row.prompt if group_by is None else as_text(record[group_by])
            for sides in row.sides:
                # Pairs whose images both exist
                paths = [find_image(file, side, location) for side in sides]
                absent = [side for side, text in zip(sides, paths, strict=True) if not text]
                if absent:
                    dropped.append(SkippedRow(location, f"{' and '.join(absent)} does not exist", "missing image"))
                else:
                    pair = FilePair(row.prompt, *sides, paths[0], paths[1], location, group, row.rejected_prompt)
                    pairs.append(pair)
    return Pairs(path, FileRows(pairs), np.arange(len(pairs)), dropped, tied)


def _text(location: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{location}: {name} is {shorten(value)}; expected a text")
    return value


def _read_sides(location: str, record: Record) -> ParsedPairs:
    prompt = _text(location, "prompt", record["prompt"])
    rejected_prompt = _text(location, "rejected_prompt", record.get("rejected_prompt") or "")
    chosen, rejected = (_text(location, side, record[side]) for side in ("chosen", "rejected"))
    return ParsedPairs(prompt, [(chosen, rejected)], rejected_prompt)


def _read_ranking(location: str, record: Record) -> ParsedPairs:
    """Return (better, worse) for every two images of different rank, and the number of ties."""
    prompt = _text(location, "prompt", record["prompt"])
    images, rank, preference = (record.get(name) for name in ("image_path", "rank", "human_preference"))
    values = rank if rank is not None else preference
    if not isinstance(images, list) or not isinstance(values, list) or len(images) != len(values):
        raise ValueError(
            f"{location}: image_path is {shorten(images)}, rank is {shorten(rank)} and human_preference is "
            f"{shorten(preference)}; expected a list of images, and one as long of ranks or preferences"
        )
    if not all(isinstance(v, int | float) and v == v for v in values):
        raise ValueError(f"{location}: the ranks are {shorten(values)}; expected numbers")
    worth = [-v if rank is not None else v for v in values]
    ordered = [(images[i], images[j]) for i, a in enumerate(worth) for j, b in enumerate(worth) if a > b]
    return ParsedPairs(prompt, ordered, ties=len(images) * (len(images) - 1) // 2 - len(ordered))


def _unread(location: str, record: Record) -> ParsedPairs:
    raise AssertionError(f"{location}: tables are read by column")


LAYOUTS = (
    Layout(
        "pick_a_pic",
        TABLES,
        ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
        ("image_0_uid", "image_1_uid", "are_different", "has_label", "rejected_caption"),
        _unread,
        {"prompt": "caption", "rejected_prompt": "rejected_caption"},
    ),
    Layout("folder", (".jsonl",), ("prompt", "chosen", "rejected"), ("rejected_prompt",), _read_sides),
    Layout("rankings", JSON, ("prompt", "image_path"), ("rank", "human_preference"), _read_ranking),
)
