"""Shared set-up: tiny models, data on disk, recipes, batches and short runs. Importing it loads no heavy library."""

from collections.abc import Callable
from pathlib import Path

Folders = Callable[[str], Path]  # the folder of a tiny model by its name
STANDING_VLMS = ("llava", "llava_next", "qwen2_5_vl", "paligemma")  # the types that general tests run on
