"""Dry run of a training: its checks, first lines and plan, without an update and without a file in its output."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign import methods
from mmalign.atomic_io import check_owned
from mmalign.commands import _resume, preflight
from mmalign.commands.plan import make_plan, memory_of_card, show
from mmalign.commands.train import describe_updates
from mmalign.config import Recipe
from mmalign.data.data_module import Splits, summarize
from mmalign.modalities import loading, modality_of
from mmalign.training import checkpoint
from mmalign.training.export import RUN_INFO
from mmalign.training.launch import open_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def dry_run(recipe: Recipe) -> None:
    """Check all that a training checks before its first update, and print its first lines and its plan.

    Weights are loaded only where the output has a checkpoint, to see whether the training would resume from it.

    Raises:
        ValueError: the recipe, the data or a checkpoint does not fit.
    """
    preflight.check(recipe, "training")
    _check_output(Path(recipe.output))
    modality, needs = modality_of(recipe), methods.requirements_of(recipe.method)
    splits = modality.open_pairs(recipe, needs)
    preflight.check_annotators(needs, splits[0])
    recipe = modality.name_annotators(recipe, splits[0])
    accelerator = open_accelerator(recipe.train, rank_timeout=recipe.limits.rank_timeout)
    for line in needs.check():
        logger.info(line)
    updates = describe_updates(recipe.train, needs, len(splits[0]), accelerator.num_processes)
    logger.info(f"{recipe.method.name}: {recipe.model.path}, {recipe.model.tune}; {summarize(splits)}")
    # A plan covers no judges
    if accelerator.is_main_process and modality.encode_example is not None:
        memory = memory_of_card(None)
        show(make_plan(recipe, splits, updates, memory), recipe, memory)
    else:
        logger.info(updates)
    logger.info(_describe_start(recipe, splits, accelerator))
    accelerator.end_training()


def _check_output(output: Path) -> None:
    """Check that a training could write to its output, which may not exist yet.

    Raises:
        ValueError: it could not, or the folder `model` is another program's.
    """
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output: {output} is not writable; choose a writable folder")
    check_owned(output / "model", RUN_INFO)


def _describe_start(recipe: Recipe, splits: Splits, accelerator: Accelerator) -> str:
    """Return a sentence with the update that the training would begin after."""
    output, saved = Path(recipe.output), None
    # The identity has a fingerprint of the weights, so there is nothing to load without a checkpoint
    if checkpoint.complete(output):
        family = loading.load_for_training(recipe, accelerator.device)
        identity = _resume.identify(recipe, family, splits[0], accelerator.num_processes)
        saved = _resume.last_checkpoint(recipe, identity)
    start = f"would resume from {checkpoint.name(saved.step)}" if saved is not None else "would begin"
    return f"dry run: all checks passed and nothing was written; the training {start} in {output}"
