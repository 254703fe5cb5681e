"""Preference alignment of text-to-image and vision-language models.

    recipe = mmalign.load_recipe("text_to_image/quickstart", ["train.seed=1"])
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
    from mmalign.commands.bench import Report
    from mmalign.commands.evaluate import Evaluation
    from mmalign.commands.train import Trained
    from mmalign.config import Recipe
    from mmalign.pages.comparison import TableRow
    from mmalign.synthesis.rejected_responses import Writer

__version__ = "0.1.0"
__all__ = [
    "bench",
    "cache",
    "compare",
    "evaluate",
    "explain",
    "gallery",
    "load_recipe",
    "prepare",
    "quickstart",
    "train",
]


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


def cache(recipe: Recipe) -> Path:
    """Encode what a recipe's training would read again and again, and return the folder."""
    from mmalign.commands import cache as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.cache(recipe)


def compare(
    sources: Sequence[str],
    *,
    seeds: int = 3,
    output: Path = Path("runs/compare"),
    pairs: Sequence[int] = (),
    overrides: Sequence[str] = (),
    table: Path | None = None,
) -> list[TableRow]:
    """Train recipes with several seeds, evaluate each run, and write one table.

    Args:
        sources: recipes, by path or bundled name; all of one model and one benchmark.
        seeds: number of runs of each recipe.
        output: folder of all files.
        pairs: numbers of pairs after which every run is also evaluated.
        overrides: assignments of all recipes, such as "train.lr=1e-5".
        table: path of a second copy of the table, as Markdown.
    """
    from mmalign.commands import compare as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.compare(sources, seeds=seeds, output=output, pairs=pairs, overrides=overrides, table=table)


def bench(
    source: str | Path | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    repeats: int = 5,
    json: Path | None = None,
) -> Report:
    """Measure a training step: pairs per second, its parts, operations and memory.

    Args:
        source: a recipe: a path, a bundled name, or the content.
        overrides: assignments for all runs, such as "train.precision=bfloat16".
        variants: assignments of each further run, separated by spaces.
        repeats: number of measurements of each run.
        json: a file for the numbers.
    """
    from mmalign.commands import bench as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.bench(source, overrides=overrides, variants=variants, repeats=repeats, json=json)


def quickstart(
    modality: str = "text_to_image", *, seed: int = 0, generate: bool = False, output: Path | None = None
) -> dict[str, object]:
    """Align a bundled model on this machine, and return the numbers before and after.

    Args:
        modality: "text_to_image" or "vision_language".
        seed: seed of the training.
        generate: true to generate the pairs instead of reading the bundled ones.
        output: folder of all files; the recipe's by default.
    """
    from mmalign.commands import quickstart as command
    from mmalign.console import configure_logging

    configure_logging()
    return command.quickstart(modality, seed=seed, generate=generate, output=output)


def explain(key: str | None = None) -> list[str]:
    """Return lines on a recipe's key, such as "train.lr": its meaning, type, default and limits."""
    from mmalign.commands import explain as command

    return command.explain(key)
