"""Prompt data for methods that generate their own images, from a text file or from pairs.

A prompt that occurs several times in a text file gives as many rows, each with its own random numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmalign.data.pairs import ImagePair, Pairs, stable_hash
from mmalign.reading import read_text

_COMMENT = re.compile(r"#+(\s|$)")


@dataclass(frozen=True)
class PromptRow:
    """Prompt with its identity.

    Attributes:
        row: 63-bit id that seeds the prompt's random draws.
        prompt: the text.
        location: the prompt's position in its source, for messages.
    """

    row: int
    prompt: str
    location: str

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
