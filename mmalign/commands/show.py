"""The command `show`: the numbers of a recipe's pairs, and some pairs exactly as the model will see them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmalign import methods
from mmalign.atomic_io import prepare_file
from mmalign.commands import preflight
from mmalign.commands.train import describe_updates
from mmalign.config import Recipe
from mmalign.data.data_module import Splits, summarize
from mmalign.data.pairs import SkippedRow
from mmalign.modalities import modality_of
from mmalign.pages import examples
from mmalign.pages.examples import DataView

logger = logging.getLogger(__name__)


def show(recipe: Recipe, *, number: int = 5, html: Path | None = None) -> DataView:
    """Log the numbers of a recipe's pairs and the first examples of its training; no network is loaded.

    Args:
        recipe: the recipe.
        number: the number of examples.
        html: a file for the page with pictures.

    Returns:
        The sentences and the examples.

    Raises:
        ValueError: the data or the model's configurations cannot be read, or the page cannot be written.
    """
    prepare_file("--html", html)
    preflight.check(recipe, "training")
    modality, needs = modality_of(recipe), methods.requirements_of(recipe.method)
    splits = modality.open_pairs(recipe, needs)
    view = modality.show(recipe, splits, number)
    facts = [
        summarize(splits),
        *_dropped(splits),
        describe_updates(recipe.train, needs, len(splits[0]), 1),
        *view.facts,
    ]
    view = DataView(facts, view.examples)
    for line in view.lines():
        logger.info(line)
    if html is not None:
        examples.write(html, view, f"What {recipe.method.name} will see of {recipe.data.path}")
        logger.info(f"page: {html}")
    return view


def _dropped(splits: Splits) -> Iterator[str]:
    """Yield the numbers of dropped rows by kind of reason, the commonest first, each with its first row."""
    first = dict[str, SkippedRow]()
    rows = splits[0].skipped
    for row in rows:
        first.setdefault(_kind(row), row)
    for kind, number in Counter(map(_kind, rows)).most_common():
        yield f"dropped: {number:,} {'row' if number == 1 else 'rows'} like {first[kind]}"


def _kind(row: SkippedRow) -> str:
    """Return the kind of a row's defect: its reason without names, paths and numbers."""
    return re.sub(r"'[^']*'|\S*[./\\]\S*|\d+", "", row.reason) if row.defect == "unusable" else row.defect
