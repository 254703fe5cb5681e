"""The command `doctor`: find defects of preference data before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign import methods
from mmalign.atomic_io import prepare_file
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats import conversations, image_layouts
from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.layouts import AUTO, THUMBS, Layout, Learning, recognize
from mmalign.data.formats.responses import open_responses
from mmalign.data.formats.sources import open_source
from mmalign.data.pairs import Pairs
from mmalign.doctor import page
from mmalign.doctor.checks import NAMES
from mmalign.doctor.corpus import TRAINING, VALIDATION, Corpus, NotChecked, RecipeInputs, survey
from mmalign.doctor.report import FailOn, examine
from mmalign.modalities import modality_of
from mmalign.registry import check_known
from mmalign.resources import bundled_recipes

logger = logging.getLogger(__name__)

_PAIRS = [layout for layout in conversations.LAYOUTS if layout.name != "answers"]  # reference answers are no pairs
_RESPONSES = [*_PAIRS, conversations.THUMBS]
_LAYOUTS: list[Layout[Any]] = [*image_layouts.LAYOUTS, image_layouts.THUMBS, *_RESPONSES]
_NO_RECIPE = NotChecked("no recipe is given")


def doctor(
    sources: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    format: str | None = None,
    images: Path | None = None,
    ignore: Sequence[str] = (),
    fail_on: FailOn = "warning",
    json: Path | None = None,
    html: Path | None = None,
) -> int:
    """Examine a recipe's data or files, log the report, and return the exit code: 1 for findings, else 0.

    Args:
        sources: one recipe and assignments for it such as "data.limit=100", or files of pairs.
        overrides: further assignments for the recipe, applied first.
        format: the format of the files; None guesses it from their columns.
        images: the folder of the image paths of response files.
        ignore: names of checks to leave out.
        fail_on: the lowest level of findings that gives the exit code 1; "none" always gives 0.
        json: a file for all findings.
        html: a file for the page with pictures.

    Raises:
        ValueError: the data cannot be read, a report cannot be written, or an argument is wrong.
        CheckpointError: the disk is full.
    """
    prepare_file("--json", json)
    prepare_file("--html", html)
    for name in ignore:
        check_known("--ignore: there is no check", name, NAMES)
    # One recipe and its assignments, or files
    is_recipe = any(map(_is_recipe, sources))
    values = [source for source in sources[1:] if is_recipe and "=" in source]
    if is_recipe and (len(sources) > 1 + len(values) or format is not None or images is not None):
        raise ValueError("doctor: expected one recipe alone, or files of pairs with --format and --images")
    if overrides and not is_recipe:
        raise ValueError("--set: changes a recipe's values, and no recipe is given; use --format and --images")
    corpus = open_recipe(sources[0], [*overrides, *values]) if is_recipe else open_files(sources, format, images)
    report = examine(corpus, sources[0] if is_recipe else " ".join(sources), ignore)
    for line in report.lines():
        logger.info(line)
    if json is not None:
        report.write_json(json)
    if html is not None:
        page.write(html, report)
        logger.info(f"page: {html}")
    return report.exit_code(fail_on)


def _is_recipe(source: str) -> bool:
    """Return whether an argument is a recipe: a YAML file, or the short name of a bundled one."""
    if source.endswith((".yaml", ".yml")) or os.path.exists(source):
        return source.endswith((".yaml", ".yml"))
    return any(source in (name, path.stem) for name, path in bundled_recipes().items())


def open_recipe(name: str, overrides: Sequence[str] = ()) -> Corpus:
    """Read the pairs of a recipe, with its validation split and the inputs of its evaluation and model.

    Raises:
        ValueError: the recipe or its data cannot be read.
    """
    recipe = load_recipe(name, overrides)
    modality = modality_of(recipe)
    modality.check_data(recipe)
    training, validation = modality.open_pairs(recipe, methods.requirements_of(recipe.method))
    sources: list[tuple[str, Pairs[Any]]] = [(TRAINING, training)]
    sources += [(VALIDATION, validation)] if validation is not None else []
    return survey(sources, modality.doctor_inputs(recipe))


def open_files(paths: Sequence[str], format: str | None = None, images: Path | None = None) -> Corpus:
    """Read the pairs of files without a recipe, as training pairs.

    Raises:
        ValueError: a file cannot be read, or its format is unknown.
    """
    sources = [(TRAINING, _open_file(path, format, images)) for path in paths]
    return survey(sources, RecipeInputs(_NO_RECIPE, _NO_RECIPE, _NO_RECIPE))


def _open_file(path: str, format: str | None, folder: Path | None) -> Pairs[Any]:
    if format is not None:
        check_known("--format: there is no", format, sorted({layout.name for layout in _LAYOUTS}))
    # Images and responses have layouts of one name; the columns tell which
    named = [layout for layout in _LAYOUTS if format in (None, layout.name)]
    if len(named) > 1:
        source = open_source(path, None)
        named = [recognize(named, source.columns, source.sample, f"doctor: {path}")]
    (layout,) = named
    learning: Learning = "thumbs" if layout.name == THUMBS else "pairs"
    if any((layout.name, layout.required) == (known.name, known.required) for known in _RESPONSES):
        return open_responses(format or AUTO, path, images=folder, learning=learning)
    return open_pairs(format or AUTO, path, images=folder, learning=learning)
