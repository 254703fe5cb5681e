"""Prompts for generation, from files or from the bundled world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.data.formats import prompts
from mmalign.data.formats.prompts import Prompt
from mmalign.resources import located, resolve


def read_prompts(key: str, name: str) -> list[Prompt]:
    """Read the prompts of a text file, one a line, without empty lines and comments, or of a table with sources.

    Raises:
        ValueError: the file is missing, is not text, has no prompt, or a row of a table is bad.
    """
    return prompts.read_prompt_rows(key, Path(located(key, name, resolve)))


def read_prompt_pairs(key: str, name: str) -> list[tuple[str, str]]:
    """Read the prompt pairs of a file, one pair a line, separated by a tab.

    Raises:
        ValueError: the file is missing, is not text, or has no prompt, or a line does not hold two prompts.
    """
    couples = []
    for _, line in prompts.read_prompts(key, Path(located(key, name, resolve))):
        first, _, second = (part.strip() for part in line.partition("\t"))
        if not first or not second or "\t" in second:
            raise ValueError(f"{key}: {name} has the line {line[:60]!r}; expected two prompts with a tab between them")
        couples.append((first, second))
    return couples


def load_prompts(key: str, which: int | str, split: Any, seed: int) -> list[Prompt]:
    """Return a number of the bundled world's prompts, or those of the file that the recipe names at `key`."""
    if isinstance(which, str):
        return read_prompts(key, which)
    from mmalign.toy.scenes import sample_prompts

    return [Prompt(str(prompt)) for prompt in sample_prompts(split, which, seed)]


def load_prompt_pairs(key: str, source: int | str, seed: int) -> list[tuple[str, str]]:
    """Return contrasting prompt pairs: a number of the bundled world's, or those of the file named at `key`."""
    if isinstance(source, str):
        return read_prompt_pairs(key, source)
    from mmalign.toy.scenes import sample_prompt_pairs

    return [(str(first), str(second)) for first, second in sample_prompt_pairs(source, seed)]
