"""Preference alignment of text-to-image and vision-language models.

    recipe = mmalign.load_recipe("configs/text_to_image/quickstart.yaml", ["train.seed=1"])
    mmalign.train(recipe)
    result = mmalign.evaluate(recipe)
    page = mmalign.gallery(recipe)

Importing the package loads nothing heavy; `mmalign.losses` needs torch alone.

These functions log to the logger `mmalign`, and the main process prints its lines to standard output. To send the lines
elsewhere, give that logger a handler before the first call: your own, or `logging.NullHandler()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmalign.commands.evaluate import Evaluation
    from mmalign.commands.train import Trained
    from mmalign.config import Recipe
    from mmalign.synthesis.rejected_responses import Writer

__version__ = "0.1.0"
__all__ = ["evaluate", "gallery", "load_recipe", "prepare", "train"]


def load_recipe(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe from a path, the name of a shipped recipe, or a mapping."""
    from mmalign.commands import load_recipe as command

    return command.load_recipe(source, overrides)


def train(recipe: Recipe) -> Trained:
    """Train by a recipe, or resume from its last checkpoint."""
    from mmalign.commands import train as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.train(recipe)


def evaluate(recipe: Recipe) -> Evaluation:
    """Compare the base model with the trained one."""
    from mmalign.commands import evaluate as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.evaluate(recipe)


def gallery(recipe: Recipe) -> Path:
    """Write a page of base and trained outputs side by side, and return its path."""
    from mmalign.commands import gallery as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.gallery(recipe)


def prepare(recipe: Recipe, *, writer: Writer | None = None) -> Path:
    """Write the preference pairs of a recipe and return their file."""
    from mmalign.commands import prepare as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.prepare(recipe, writer=writer)
