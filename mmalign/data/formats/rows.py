"""Rows of pairs by number, over a memory-mapped table or a list of image files; a pair is built when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.files import locate_row
from mmalign.data.pairs import ImagePair, ImageRef, stable_hash


class TableRows:
    """Pairs of a `datasets` table whose images are bytes in its columns.

    Args:
        table: a datasets.Dataset with undecoded images; it maps its file, so nothing is in memory.
        names: the Pick-a-Pic column names that there are, to the table's.
        group: the table's column that names a pair's group.
        starts: the first row of every file, and its name.
    """

    def __init__(self, table: Any, names: Mapping[str, str], group: str, starts: Sequence[tuple[int, str]]) -> None:
        self._names, self._starts, self._group = names, starts, group
        light = {n for c, n in names.items() if c not in ("jpg_0", "jpg_1")} | {group}
        self._text = table.select_columns(sorted(light))
        self._images = {c: table.select_columns([names[c]]) for c in ("jpg_0", "jpg_1")}
        self._chosen_is_1: NDArray[np.bool_] = np.zeros(len(table), dtype=bool)

    def swap(self, chosen_is_1: NDArray[np.bool_]) -> None:
        """Say in which rows [N] the second image is the chosen one."""
        self._chosen_is_1 = chosen_is_1

    def where(self, number: int) -> str:
        """The file and, counted from 0, its row."""
        return locate_row(self._starts, number)

    def pair(self, number: int) -> ImagePair:
        """The pair in a row."""
        text = self._text[number]
        sides = (1, 0) if self._chosen_is_1[number] else (0, 1)
        chosen, rejected = (self._image(number, side, text) for side in sides)
        prompt = text[self._names["caption"]]
        second = text.get(self._names.get("rejected_caption", "")) or ""
        row = stable_hash(prompt, chosen.key, rejected.key, *filter(None, [second]))
        return ImagePair(row, prompt, chosen, rejected, self.where(number), str(text[self._group]), second)

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """The groups of these rows."""
        column = self._text.data.column(self._group)
        return [str(value) for value in column.take(numbers).to_pylist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """The prompts of these rows, and those of their rejected images."""
        columns = [self._names[c] for c in ("caption", "rejected_caption") if c in self._names]
        prompts = [self._text.data.column(name).take(numbers).to_pylist() for name in columns]
        return [*prompts[0], *(second for some in prompts[1:] for second in some if second)]

    def _image(self, number: int, side: int, text: Mapping[str, Any]) -> ImageRef:
        column = f"jpg_{side}"
        load = partial(cell, self._images[column], self._names[column], number)
        uid = text.get(self._names.get(f"image_{side}_uid", ""))
        key = f"uid:{uid}" if uid else f"bytes:{hashlib.blake2b(load(), digest_size=16).hexdigest()}"
        return ImageRef(key, f"{self.where(number)}, {self._names[column]}", load)


def cell(table: Any, column: str, number: int) -> bytes:
    """The bytes of an image in a table: raw, or in a struct of bytes and path; none if there is nothing."""
    value = table[number][column]
    data = value["bytes"] if isinstance(value, dict) else value
    return bytes(data) if data is not None else b""


class FilePair(NamedTuple):
    """A pair of image files: names as their source gives them, paths, and where it stands."""

    prompt: str
    chosen: str
    rejected: str
    chosen_path: str
    rejected_path: str
    location: str
    group: str
    rejected_prompt: str = ""


class FileRows:
    """Pairs of image files."""

    def __init__(self, pairs: Sequence[FilePair]) -> None:
        self._pairs = pairs

    def pair(self, number: int) -> ImagePair:
        """The pair of that number; its files are looked at, not read."""
        p = self._pairs[number]
        chosen = file_ref(p.chosen_path, f"{p.location}, chosen ({p.chosen})")
        rejected = file_ref(p.rejected_path, f"{p.location}, rejected ({p.rejected})")
        # By the names and not by the keys: a copy of the folder has new times, and must give the same numbers.
        row = stable_hash(p.prompt, p.chosen, p.rejected, *filter(None, [p.rejected_prompt]))
        return ImagePair(row, p.prompt, chosen, rejected, p.location, p.group, p.rejected_prompt)

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """The groups of these pairs."""
        return [self._pairs[n].group for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """The prompts of these pairs, and those of their rejected images."""
        pairs = [self._pairs[n] for n in numbers.tolist()]
        return [p.prompt for p in pairs] + [p.rejected_prompt for p in pairs if p.rejected_prompt]


def file_ref(path: str, location: str) -> ImageRef:
    """An image file, whose key changes when it does."""
    file = Path(path)
    try:
        stat = file.stat()
        state = f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:  # gone since it was indexed: `read` will say so
        state = "gone"
    return ImageRef(f"file:{stable_hash(str(file.resolve()), state):016x}", location, file.read_bytes, path)
