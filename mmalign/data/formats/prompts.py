"""Prompts of images to generate, from a text file, a table or pairs.

A prompt that occurs several times in a text file gives as many rows, each with its own random numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.data.formats.files import Record, kind_of
from mmalign.data.formats.image_columns import PROMPTS, SOURCES
from mmalign.data.formats.image_files import Image, ImageReader, as_image
from mmalign.data.formats.image_layouts import SOURCE, required_text
from mmalign.data.formats.layouts import Layout, recognize
from mmalign.data.formats.rows import SourceRow
from mmalign.data.formats.sources import KINDS, open_source
from mmalign.data.pairs import ImagePair, ImageRef, Pairs, SkippedRow, UnusableRowError, stable_hash
from mmalign.reading import read_text

_COMMENT = re.compile(r"#+(\s|$)")


@dataclass(frozen=True)
class PromptRow:
    """Prompt with its identity.

    Attributes:
        row: 63-bit id that seeds the prompt's random draws.
        prompt: the text.
        location: the prompt's position in its source, for messages.
        source: the image to edit; always None, since methods that generate images do not edit.
    """

    row: int
    prompt: str
    location: str
    source: None = None

    @property
    def content(self) -> tuple[str, ...]:
        """The prompt."""
        return (self.prompt,)

    @property
    def identity(self) -> tuple[str, ...]:
        """The prompt."""
        return self.content


class _Rows:
    """Source of prompts by number."""

    def __init__(self, prompts: Sequence[PromptRow]) -> None:
        self._prompts = prompts

    def pair(self, number: int) -> PromptRow:
        """Return the prompt of that number."""
        return self._prompts[number]

    def groups(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the prompts' texts, so that equal prompts form a group."""
        return self.prompts(numbers)

    def prompts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return the texts of these prompts."""
        return [self._prompts[n].prompt for n in numbers.tolist()]

    def liked(self, numbers: NDArray[np.int64]) -> list[bool]:
        """Return True for each of these prompts, which have no labels."""
        return [True] * len(numbers)

    def annotators(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return "" for each of these prompts, which have no annotators."""
        return [""] * len(numbers)


def read_prompts(key: str, path: Path) -> list[tuple[int, str]]:
    """Return (line number, prompt) of a text file with one prompt a line, without empty lines and comments.

    A comment begins with # and a space; "#1 dad mug" is a prompt.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 text, or has no prompt; the message begins with `key`.
    """
    text = read_text(path, "expected a text file in UTF-8", f"{key}: {path}")
    lines = [line.strip() for line in text.split("\n")]  # not splitlines, which splits at U+2028 too
    prompts = [(index, line) for index, line in enumerate(lines, start=1) if line and not _COMMENT.match(line)]
    if not prompts:
        raise ValueError(f"{key}: {path} has none; expected one prompt a line")
    return prompts


class Prompt(NamedTuple):
    """Prompt of an image to generate, and the image that it edits, if there is one."""

    text: str
    source: ImageRef | None = None


def sources_of(prompts: Sequence[Prompt]) -> list[ImageRef] | None:
    """Return the source image of each prompt, or None if they have none."""
    sources = [prompt.source for prompt in prompts if prompt.source is not None]
    return sources or None


def read_prompt_rows(key: str, path: Path) -> list[Prompt]:
    """Read the prompts of a text file, or of a table with `prompt` and perhaps `source`.

    Raises:
        ValueError: the file cannot be read, has no prompt, or a row of a table is bad; the message begins with `key`.
    """
    if kind_of(path) not in KINDS:
        return [Prompt(text) for _, text in read_prompts(key, path)]
    try:
        source = open_source(str(path), None)
        layout = recognize([ROWS], source.columns, source.sample, f"{key}: {path}")
        # If a file has sources, every row needs one
        if SOURCE in layout.names:
            layout = replace(layout, required=(*layout.required, SOURCE))
        rows = source.rows({layout.column(name) for name in layout.columns})
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).removeprefix('data.path: ').removeprefix(f'{key}: ')}") from error
    # Paths are relative to the table's folder
    reader = ImageReader()
    return [_read_row(key, row, layout, reader) for row in rows]


def _read_row(
    key: str, row: SourceRow | SkippedRow, layout: Layout[tuple[str, Image | None]], reader: ImageReader
) -> Prompt:
    if isinstance(row, SkippedRow):
        raise ValueError(f"{key}: {row}; repair the row, or remove it")
    try:
        text, image = layout.read(row.location, row.record)
        if image is None:
            return Prompt(text)
        reader.check(image, row.folders)
    except UnusableRowError as error:
        raise ValueError(f"{key}: {row.location} {error}; repair the row, or remove it") from error
    return Prompt(text, reader.ref(image, row.folders, partial("{}, {}".format, row.location, SOURCE)))


def _parse_row(location: str, record: Record) -> tuple[str, Image | None]:
    return required_text(record, "prompt"), as_image(record[SOURCE]) if SOURCE in record else None


ROWS = Layout("prompts", ("prompt",), (SOURCE,), _parse_row, synonyms={"prompt": PROMPTS, SOURCE: SOURCES})


def open_prompts(path: str, limit: int | None = None) -> Pairs[PromptRow]:
    """Open the prompts of a text file, at most `limit`.

    Raises:
        ValueError: the file does not exist, is not UTF-8 text, or has no prompt.
    """
    if not Path(path).exists():
        raise ValueError(f"data.path: {path} does not exist; expected a text file with one prompt a line")
    lines = read_prompts("data.path", Path(path))
    return _numbered(path, [text for _, text in lines], [f"{path}: line {index}" for index, _ in lines], limit)


def unique_prompts(pairs: Pairs[ImagePair], limit: int | None = None) -> Pairs[PromptRow]:
    """Return the prompts of pairs, each once, without reading images."""
    texts = [text for text in dict.fromkeys(pairs.prompts()) if text.strip()]
    return _numbered(pairs.source, texts, [f"{pairs.source}: {text!r}" for text in texts], limit)


def _numbered(source: str, texts: Sequence[str], locations: Sequence[str], limit: int | None) -> Pairs[PromptRow]:
    seen, prompts = Counter[str](), list[PromptRow]()
    for text, place in zip(texts[:limit], locations[:limit], strict=True):
        prompts.append(PromptRow(stable_hash("prompt", text, str(seen[text])), text, place))
        seen[text] += 1
    if not prompts:
        raise ValueError(f"data.path: {source} has no prompt; expected at least one")
    return Pairs(source, _Rows(prompts), np.arange(len(prompts)))
