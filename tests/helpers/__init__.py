"""Shared set-up: tiny models, data on disk, recipes, batches and short runs. Importing it loads no heavy library."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Folders = Callable[[str], Path]  # the folder of a tiny model by its name
STANDING_VLMS = ("llava", "llava_next", "qwen2_5_vl", "paligemma")  # the types that general tests run on


def first_fast(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Return parameters of which all but the first are marked slow: `make check` runs those, `make test` runs all."""
    every = [value if isinstance(value, tuple) else (value,) for value in values]
    slow = (pytest.param(*value, marks=pytest.mark.slow) for value in every[fast:])
    return [*(pytest.param(*value) for value in every[:fast]), *slow]
