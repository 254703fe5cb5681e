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

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.data.formats.files import (
    TABLES,
    find_files,
    find_image,
    is_hub_path,
    load_hub,
    load_tables,
    locate_row,
    read_schema,
    records,
    shorten,
)
from mmalign.data.formats.rows import FilePair, FileRows, TableRows
from mmalign.data.pairs import Pairs, SkippedRow, format_rows

REQUIRED: dict[str, tuple[str, ...]] = {
    "pick_a_pic": ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
    "folder": ("prompt", "chosen", "rejected"),
    "rankings": ("prompt", "image_path"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "pick_a_pic": ("image_0_uid", "image_1_uid", "are_different", "has_label", "rejected_caption"),
    "folder": ("rejected_prompt",),
    "rankings": ("rank", "human_preference"),
}
_SUFFIXES = {"pick_a_pic": TABLES, "folder": (".jsonl",), "rankings": (".json", ".jsonl")}

Columns = Mapping[str, str]


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
    names, needed = _column_names(format, columns or {}), prompt_pairs is not None
    if format == "pick_a_pic":
        pairs = _open_tables(path, split, names, group_by, needed)
    else:
        pairs = _open_files(format, path, split, names, group_by, needed)
    if not len(pairs):
        why = f": {format_rows(pairs.skipped)}" if pairs.skipped else ""
        expected = "in which one image is preferred"
        if prompt_pairs is not None:
            expected = f"with what the rejected image shows, rejected_caption or rejected_prompt: {prompt_pairs}"
        raise ValueError(
            f"data.path: {path} has no pair to learn from ({pairs.ties:,} ties, {len(pairs.skipped):,} rows dropped"
            f"{why}); expected rows {expected}"
        )
    return pairs[:limit] if limit is not None else pairs


def check_source(
    format: str, path: str, *, split: str | None = None, columns: Columns | None = None, group_by: str | None = None
) -> None:
    """Check, without reading images, that the files exist and have the columns; the Hub is not contacted.

    Raises:
        ValueError: the format is unknown, or a file or column is missing.
    """
    names = _column_names(format, columns or {})
    if format == "pick_a_pic":
        if not is_hub_path(path):
            _check_schema(find_files(path, split, _SUFFIXES[format])[0], names, group_by)
        return
    for file in find_files(path, split, _SUFFIXES[format]):
        for location, record in records(file):
            _check_columns(location, list(record), [names[c] for c in REQUIRED[format]], group_by)
            break


def _column_names(format: str, columns: Columns) -> dict[str, str]:
    """Return the map from every column of the format to its name in the files."""
    if format not in REQUIRED:
        near = difflib.get_close_matches(format, REQUIRED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"data.format: {format!r} is unknown{hint} (there are {', '.join(REQUIRED)})")
    names = {c: c for c in REQUIRED[format] + OPTIONAL[format]}
    for name, column in columns.items():
        own = name.replace("prompt", "caption") if format == "pick_a_pic" else name
        if own not in names:
            raise ValueError(f"data.columns: {format} has no column {name!r} to rename; it has {', '.join(names)}")
        names[own] = column
    return names


def _check_columns(location: str, columns: Sequence[str], needed: Sequence[str], group_by: str | None) -> None:
    lacking = [c for c in needed if c not in columns]
    if lacking:
        raise ValueError(
            f"{location} has no {' and no '.join(repr(c) for c in lacking)} (found {', '.join(columns) or 'nothing'}); "
            f"expected {', '.join(needed)}: data.columns names what is called otherwise, such as {{prompt: text}}"
        )
    if group_by is not None and group_by not in columns:
        raise ValueError(
            f"data.group_by: {location} has no {group_by!r} (found {', '.join(columns)}); name one of those"
        )


# --------------------------------------------------------------------------------------------------------- pick_a_pic


def _check_schema(file: Path, names: Columns, group_by: str | None) -> None:
    _check_fields(str(file), read_schema(file), names, group_by)


def _check_fields(location: str, schema: Any, names: Columns, group_by: str | None) -> None:
    import pyarrow.types as pt

    _check_columns(location, schema.names, [names[c] for c in REQUIRED["pick_a_pic"]], group_by)
    for column in ("jpg_0", "jpg_1"):
        kind = schema.field(names[column]).type
        is_struct = pt.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (pt.is_binary(kind) or pt.is_large_binary(kind) or is_struct):
            raise ValueError(f"{location}: {names[column]} is {kind}; expected images as bytes, or as bytes and path")
    second = names["rejected_caption"]
    if second in schema.names:
        kind = schema.field(second).type
        if not (pt.is_string(kind) or pt.is_large_string(kind) or pt.is_null(kind)):
            raise ValueError(f"{location}: {second} is {kind}; expected what the rejected image shows, as text")
    for column in ("label_0", "label_1"):
        kind = schema.field(names[column]).type
        if not (pt.is_floating(kind) or pt.is_integer(kind)):
            raise ValueError(f"{location}: {names[column]} is {kind}; expected a number: 1 preferred, 0 not, 0.5 a tie")


def _open_tables(
    path: str, split: str | None, names: dict[str, str], group_by: str | None, prompt_pairs: bool
) -> Pairs:
    if is_hub_path(path):
        table, starts = load_hub(path, split)
        _check_fields(f"data.path: {path}", table.features.arrow_schema, names, group_by)
    else:
        files = find_files(path, split, _SUFFIXES["pick_a_pic"])
        for file in files:
            _check_schema(file, names, group_by)
        table, starts = load_tables(path, files, {*names.values(), group_by})
    columns = table.column_names
    rows = TableRows(table, {c: n for c, n in names.items() if n in columns}, group_by or names["caption"], starts)
    usable, chosen_is_1, reasons, ties = _read_labels(table, names, columns, prompt_pairs)
    rows.swap(chosen_is_1)
    dropped = [SkippedRow(locate_row(starts, int(n)), why) for n, why in sorted(reasons.items())]
    return Pairs(path, rows, np.flatnonzero(usable), dropped, ties)


def _read_labels(
    table: Any, names: Columns, columns: Sequence[str], prompt_pairs: bool
) -> tuple[Any, Any, dict[int, str], int]:
    """Read the labels: usable rows [N], rows with jpg_1 chosen [N], reasons for skipped rows, and the number of ties.

    With `prompt_pairs`, rows without a prompt for the rejected image are skipped.
    """

    def column(name: str) -> Any:
        return table.data.column(names[name])

    first, second = (
        np.array(column(c).to_numpy(zero_copy_only=False), dtype=np.float64) for c in ("label_0", "label_1")
    )
    reasons = dict[int, str]()

    def drop(rows: Any, why: str) -> None:
        for row in np.flatnonzero(rows).tolist():
            reasons.setdefault(row, why.format(first[row], second[row]))

    # Skip rows with flags, labels or prompts that are unusable
    for flag, why in (("has_label", "has_label is false"), ("are_different", "both images are the same")):
        if names[flag] in columns:
            drop([value is False for value in column(flag).to_pylist()], why)
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
    return sound & ~ties, second > first, reasons, int(ties.sum())


# ------------------------------------------------------------------------------------------------- folder and rankings


def _open_files(
    format: str, path: str, split: str | None, names: dict[str, str], group_by: str | None, prompt_pairs: bool
) -> Pairs:
    pairs, dropped, ties = list[FilePair](), list[SkippedRow](), 0
    for file in find_files(path, split, _SUFFIXES[format]):
        for location, record in records(file):
            _check_columns(location, list(record), [names[c] for c in REQUIRED[format]], group_by)
            # Prompts
            prompt = record[names[REQUIRED[format][0]]]
            if not isinstance(prompt, str):
                raise ValueError(f"{location}: {names['prompt']} is {shorten(prompt)}; expected a text")
            other = _rejected_prompt(location, record, names)
            if prompt_pairs and not other:
                dropped.append(SkippedRow(location, f"has no {names.get('rejected_prompt', 'second prompt')}"))
                continue
            # Pairs of images that exist
            group = prompt if group_by is None else str(record[group_by])
            if format == "folder":
                sides, new_ties = [(record[names["chosen"]], record[names["rejected"]])], 0
            else:
                sides, new_ties = _ordered(location, record, names)
            ties += new_ties
            for chosen, rejected in sides:
                paths = [find_image(file, side, location) for side in (chosen, rejected)]
                absent = [side for side, text in zip((chosen, rejected), paths, strict=True) if not text]
                if absent:
                    dropped.append(SkippedRow(location, f"{' and '.join(absent)} does not exist"))
                else:
                    pairs.append(FilePair(prompt, chosen, rejected, paths[0], paths[1], location, group, other))
    return Pairs(path, FileRows(pairs), np.arange(len(pairs)), dropped, ties)


def _rejected_prompt(location: str, record: Mapping[str, Any], names: Columns) -> str:
    """Return the rejected image's prompt; empty if the pair has one prompt."""
    prompt = record.get(names.get("rejected_prompt", "")) or ""
    if not isinstance(prompt, str):
        raise ValueError(f"{location}: {names['rejected_prompt']} is {shorten(prompt)}; expected a text")
    return prompt


def _ordered(location: str, record: Mapping[str, Any], names: Columns) -> tuple[list[tuple[str, str]], int]:
    """Return (better, worse) for every two images of different rank, and the number of ties."""
    images, rank, preference = (record.get(names[c]) for c in ("image_path", "rank", "human_preference"))
    values = rank if rank is not None else preference
    if not isinstance(images, list) or not isinstance(values, list) or len(images) != len(values):
        raise ValueError(
            f"{location}: {names['image_path']} is {shorten(images)}, {names['rank']} is {shorten(rank)} and "
            f"{names['human_preference']} is {shorten(preference)}; expected a list of images, and one as long of "
            "ranks "
            "or preferences"
        )
    if not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"{location}: the ranks are {values}; expected numbers")
    worth = [-v if rank is not None else v for v in values]
    ordered = [(images[i], images[j]) for i, a in enumerate(worth) for j, b in enumerate(worth) if a > b]
    return ordered, len(images) * (len(images) - 1) // 2 - len(ordered)
