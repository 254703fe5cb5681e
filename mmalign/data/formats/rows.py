"""Sources of image pairs over a memory-mapped table or image files, built on access."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.files import Record, locate_row
from mmalign.data.pairs import ImagePair, ImageRef, stable_hash

if TYPE_CHECKING:
    from datasets import Dataset


class TableRows:
    """Image pairs of a `datasets` table with images as bytes.

    Args:
        table: a memory-mapped datasets.Dataset with undecoded images.
        names: map from the Pick-a-Pic column names that are present to the table's.
        group: the table's column with a pair's group.
        starts: (first row, name) of every file.
        chosen_is_1: the rows [N] in which the second image is the chosen one.
    """

    def __init__(
        self,
        table: Dataset,
        names: Mapping[str, str],
        group: str,
        starts: Sequence[tuple[int, str]],
        chosen_is_1: NDArray[np.bool_],
    ) -> None:
        self._names, self._starts, self._group = names, starts, group
        light = {n for c, n in names.items() if c not in ("jpg_0", "jpg_1")} | {group}
        self._text = table.select_columns(sorted(light))
        self._images = {c: table.select_columns([names[c]]) for c in ("jpg_0", "jpg_1")}
        self._chosen_is_1 = chosen_is_1
        self._keys = ImageKeys()

    def pair(self, number: int) -> ImagePair:
        """Return the pair in a row."""
        text = self._text[number]
        sides = (1, 0) if self._chosen_is_1[number] else (0, 1)
        images = chosen, rejected = [self._image(number, side) for side in sides]
        prompt = text[self._names["caption"]]
        second = text.get(self._names.get("rejected_caption", "")) or ""
        # A row id uses the images' names, where a table has them: re-encoded images keep their random numbers.
        row = stable_hash(
            prompt,
            *(self._name(side, text) or image.key for side, image in zip(sides, images, strict=True)),
            *filter(None, [second]),
        )
        locate = partial(locate_row, self._starts, number)
        return ImagePair(row, prompt, chosen, rejected, locate, str(text[self._group]), second)

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the groups of these rows."""
        column = self._text.data.column(self._group)
        return [str(value) for value in column.take(numbers).to_pylist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts of these rows, then those of their rejected images."""
        columns = [self._names[c] for c in ("caption", "rejected_caption") if c in self._names]
        prompts = [self._text.data.column(name).take(numbers).to_pylist() for name in columns]
        return [*prompts[0], *(second for some in prompts[1:] for second in some if second)]

    def _name(self, side: int, text: Record) -> str:
        uid = text.get(self._names.get(f"image_{side}_uid", ""))
        return f"uid:{uid}" if uid else ""

    def _image(self, number: int, side: int) -> ImageRef:
        column = f"jpg_{side}"
        load = partial(cell, self._images[column], self._names[column], number)
        key = self._keys.of_bytes((number, side), load)
        return ImageRef(key, partial(locate_row, self._starts, number, self._names[column]), load)


class ImageKeys:
    """Keys of a source's images: hashes of their bytes, each made once, so that later batches do not read them."""

    def __init__(self) -> None:
        self._keys: dict[Hashable, str] = {}

    def of_bytes(self, cell: Hashable, load: Callable[[], bytes]) -> str:
        """Return the key of an image in a table's cell: a hash of its bytes."""
        if cell not in self._keys:
            self._keys[cell] = f"bytes:{hashlib.blake2b(load(), digest_size=16).hexdigest()}"
        return self._keys[cell]

    def of_file(self, path: str) -> str:
        """Return the key of an image file: a hash of its bytes."""
        try:
            return self.of_bytes(path, Path(path).read_bytes)
        except OSError:  # deleted since it was indexed: `ImageRef.read` raises the error
            return f"gone:{path}"


def cell(table: Dataset, column: str, number: int) -> bytes:
    """Return the bytes of an image in a table, raw or from a struct of bytes and path; empty if there is none."""
    value = table[number][column]
    data = value["bytes"] if isinstance(value, dict) else value
    return bytes(data) if data is not None else b""


class FilePair(NamedTuple):
    """Pair of image files: names as in the source, paths, and the pair's location."""

    prompt: str
    chosen: str
    rejected: str
    chosen_path: str
    rejected_path: str
    location: str
    group: str
    rejected_prompt: str = ""


class FileRows:
    """Source of pairs of image files."""

    def __init__(self, pairs: Sequence[FilePair]) -> None:
        self._pairs, self._keys = pairs, ImageKeys()

    def pair(self, number: int) -> ImagePair:
        """Return the pair of that number; its files are read once, for their keys."""
        p = self._pairs[number]
        chosen = file_ref(self._keys, p.chosen_path, partial("{}, chosen ({})".format, p.location, p.chosen))
        rejected = file_ref(self._keys, p.rejected_path, partial("{}, rejected ({})".format, p.location, p.rejected))
        # Row ids use names instead of keys: re-encoded images keep their random numbers.
        row = stable_hash(p.prompt, p.chosen, p.rejected, *filter(None, [p.rejected_prompt]))
        return ImagePair(row, p.prompt, chosen, rejected, partial(str, p.location), p.group, p.rejected_prompt)

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the groups of these pairs."""
        return [self._pairs[n].group for n in numbers.tolist()]

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts of these pairs, then those of their rejected images."""
        pairs = [self._pairs[n] for n in numbers.tolist()]
        return [p.prompt for p in pairs] + [p.rejected_prompt for p in pairs if p.rejected_prompt]


def file_ref(keys: ImageKeys, path: str, locate: Callable[[], str]) -> ImageRef:
    """Return a reference to an image file."""
    return ImageRef(keys.of_file(path), locate, Path(path).read_bytes, path)
