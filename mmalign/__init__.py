"""mmalign aligns text-to-image and vision-language models with human preferences.

    recipe = mmalign.load_recipe("configs/text_to_image/quickstart.yaml", ["train.seed=1"])
    mmalign.train(recipe)
    result = mmalign.evaluate(recipe)
    page = mmalign.gallery(recipe)

Importing the package loads nothing heavy; `mmalign.losses` needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.rejected import Writer
    from mmalign.run import Evaluation, Trained
    from mmalign.sections import Recipe

__version__ = "0.1.0"
__all__ = ["evaluate", "gallery", "load_recipe", "prepare", "train"]


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a path, a shipped recipe's name or a mapping, all of it checked; see mmalign.recipe.load_recipe."""
    from mmalign import recipe

    return recipe.load_recipe(source, overrides)


def train(recipe: Recipe) -> Trained:
    """Train by a recipe, or go on where an earlier call stopped; see mmalign.run.train."""
    from mmalign import run

    return run.train(recipe)


def evaluate(recipe: Recipe) -> Evaluation:
    """Compare the base model with the trained one; see mmalign.run.evaluate."""
    from mmalign import run

    return run.evaluate(recipe)


def gallery(recipe: Recipe) -> Path:
    """Write the before-and-after page of what was evaluated and return its path; see mmalign.run.gallery."""
    from mmalign import run

    return run.gallery(recipe)


def prepare(recipe: Recipe, *, writer: Writer | None = None) -> Path:
    """Make the pairs that a recipe learns from and return their file; see mmalign.run.prepare."""
    from mmalign import run

    return run.prepare(recipe, writer=writer)
