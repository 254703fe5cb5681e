"""Prompts for generation: from files, and from the bundled world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmalign.data.formats import prompts
from mmalign.modalities import prompts as prompts_module
from mmalign.resources import resolve, resolve_model


def read_prompts(key: str, name: str) -> list[str]:
    """The prompts of a file, one a line; empty lines and those that begin with # are none.

    Raises:
        ValueError: there is no such file, it is no text, or it has no prompt; `key` says where its name came from.
    """
    return [prompt for _, prompt in prompts.read_prompts(key, Path(_located(key, name, resolve)))]


def read_prompt_pairs(key: str, name: str) -> list[tuple[str, str]]:
    """The couples of prompts of a file, one a line, with a tab between them.

    Raises:
        ValueError: as `read_prompts`, or a line holds other than two prompts; `key` says where its name came from.
    """
    couples = []
    for line in read_prompts(key, name):
        first, _, second = (part.strip() for part in line.partition("\t"))
        if not first or not second or "\t" in second:
            raise ValueError(f"{key}: {name} has the line {line[:60]!r}; expected two prompts with a tab between them")
        couples.append((first, second))
    return couples


def _located(key: str, name: str, find: Callable[[str], str | Path] = resolve_model) -> str:
    """What a name of the recipe means; where there is nothing, the sentence begins with the name's key."""
    try:
        return str(find(name))
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).removeprefix('model: ')}") from None


def load_prompts(key: str, which: int | str, split: Any, seed: int) -> list[str]:
    """Return prompts: a number of the bundled world's, or those of the file that the recipe names at `key`."""
    if isinstance(which, str):
        return prompts_module.read_prompts(key, which)
    from mmalign.toy.scenes import sample_prompts

    return [str(prompt) for prompt in sample_prompts(split, which, seed)]


def load_prompt_pairs(key: str, source: int | str, seed: int) -> list[tuple[str, str]]:
    """Return pairs of contrasting prompts: a number of the bundled world's, or those of the file named at `key`."""
    if isinstance(source, str):
        return prompts_module.read_prompt_pairs(key, source)
    from mmalign.toy.scenes import sample_prompt_pairs

    return [(str(first), str(second)) for first, second in sample_prompt_pairs(source, seed)]
