"""Shared set-up for tests: tiny models, data on disk, recipes, batches and short runs.

Importing it loads no heavy library.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Folders = Callable[[str], Path]  # from a tiny model's name to its folder
STANDING_VLMS = ("llava", "llava_next", "qwen2_5_vl", "paligemma")  # types for tests that need no particular model


def first_fast(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Mark all parameters but the first `fast` ones slow: `make check` skips slow ones, `make test` runs all."""
    every = [value if isinstance(value, tuple) else (value,) for value in values]
    slow = (pytest.param(*value, marks=pytest.mark.slow) for value in every[fast:])
    return [*(pytest.param(*value) for value in every[:fast]), *slow]
