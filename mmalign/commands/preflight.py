"""Checks of a recipe before any model is loaded: files, columns, devices, packages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmalign import methods
from mmalign.attention import choice
from mmalign.config import Recipe, Train
from mmalign.data.formats.files import listed
from mmalign.data.pairs import Pairs
from mmalign.families import compile, quantize
from mmalign.methods import Requirements
from mmalign.modalities import modality_of
from mmalign.modalities.loading import DTYPES, check_method_judge
from mmalign.modalities.validation import check_implicit
from mmalign.training.launch import check_launch
from mmalign.training.optim import build_optimizer

logger = logging.getLogger(__name__)

Purpose = Literal["training", "evaluation", "preparation"]


def check(recipe: Recipe, purpose: Purpose, *, data: bool = True) -> None:
    """Check all that a command needs besides a model: files, columns, classes, devices, packages.

    Args:
        recipe: the recipe to check.
        purpose: the use of the recipe. Training checks batch size, compilation, optimizer and trackers, and warns of an
            `evaluate` section that would fail afterwards.
        data: true to check the preference pairs too; generating images needs none.

    Raises:
        ValueError: a check fails; the message names the key, the value, the expectation and the remedy.
    """
    modality, needs = modality_of(recipe), methods.requirements_of(recipe.method)
    output, cache = Path(recipe.output), recipe.data.cache
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; choose a folder")
    check_precision(recipe.train)
    # Device, precision and launch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice.check(recipe.train.attention, device, DTYPES[recipe.train.precision])
    _check_quantize(recipe, device)
    if purpose == "training":
        check_launch(recipe.train)
        _check_training(recipe.train, device)
        if recipe.train.sample_every is not None:
            modality.check_samples(recipe)
        if recipe.train.batch_size < needs.min_pairs:
            raise ValueError(
                f"train.batch_size: method.name: {recipe.method.name} compares the pairs of a batch with one another; "
                f"expected at least {needs.min_pairs}, got {recipe.train.batch_size}"
            )
        if recipe.method.reference is not None:
            _check_reference(recipe, needs)
        if recipe.data.margin != "column" and "margin" not in needs.labels:
            raise ValueError(
                f"data.margin: method.name: {recipe.method.name} reads no margins; leave {recipe.data.margin} out"
            )
    if recipe.data.cut_pairs and needs.learns_from != "thumbs":
        raise ValueError(
            f"data.cut_pairs: means nothing here: method.name: {recipe.method.name} learns from {needs.learns_from}; "
            "leave it out"
        )
    # Files and models that the sections name
    modality.check(recipe)
    if purpose == "preparation":
        modality.check_preparation(recipe)
    else:
        _check_evaluation(recipe, fails=purpose == "evaluation")
    if data:
        if cache not in ("off", "auto") and Path(cache).exists() and not Path(cache).is_dir():
            raise ValueError(f"data.cache: {cache} is a file; choose a folder")
        modality.check_data(recipe)
    check_method_judge(recipe)
    modality.check_model(recipe.model)  # last, since it may query the Hub


def check_annotators(needs: Requirements, pairs: Pairs[Any]) -> None:
    """Check that some training pair has each annotator with a rate of its own.

    Raises:
        ValueError: no pair has one of them.
    """
    wanted = needs.memory.annotators if needs.memory is not None else ()
    known = sorted({*pairs.annotators()} - {""}) if wanted else []
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"method.label_noise.annotators: no pair of {pairs.source} has the annotator {', '.join(missing)} (found "
            f"{listed(known)}); correct the name, map the column annotator with data.columns, or leave it out"
        )


def _check_evaluation(recipe: Recipe, *, fails: bool) -> None:
    """Check the `evaluate` section; if it `fails` no command, only warn."""
    try:
        check_implicit(recipe)
        modality_of(recipe).check_evaluation(recipe)
    except ValueError as error:
        if fails:
            raise
        logger.warning(f"warning: `mmalign evaluate` cannot run yet: {error}")


def check_precision(options: Train) -> None:
    """Refuse float16 without a GPU.

    Raises:
        ValueError: the precision is float16 and there is no GPU.
    """
    if options.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("train.precision: float16 needs a GPU; use bfloat16 or float32")


def _check_sharding(train: Train) -> None:
    """Refuse options that sharded tensors do not support."""
    if train.optimizer != "adamw":
        raise ValueError(f"train.optimizer: {train.optimizer} does not support train.sharding: fsdp2; use adamw")
    if train.precision == "float16":
        raise ValueError("train.precision: float16 does not support train.sharding: fsdp2; use bfloat16 or float32")
    if train.compile:
        raise ValueError("train.compile: does not support train.sharding: fsdp2; leave one of them out")


def _check_quantize(recipe: Recipe, device: torch.device) -> None:
    """Check that quantized weights work with the device and the other options."""
    kind, train = recipe.model.quantize, recipe.train
    if kind is None:
        return
    quantize.check(kind, modality_of(recipe).loaded_by, device)
    for key, given, needed in (("sharding", train.sharding, "none"), ("compile", train.compile, False)):
        if given != needed:
            raise ValueError(f"model.quantize: {kind} does not support train.{key}; leave one of them out")


def _check_reference(recipe: Recipe, needs: Requirements) -> None:
    """Check that a reference that follows the policy works with the method and the other options."""
    name, adapter = recipe.method.name, recipe.model.adapter
    if not needs.reference:
        raise ValueError(f"method.reference: method.name: {name} has no reference as configured; leave it out")
    if needs.precompute is not None and recipe.data.cache != "off":
        raise ValueError(
            f"method.reference: it moves, and {name} caches what the reference gives; leave method.num_cached_draws "
            "out, or use data.cache: off"
        )
    if adapter is not None and adapter.use == "continue":
        raise ValueError(
            "method.reference: it begins as the policy does, and adapter.use: continue begins with the bare model as "
            "the reference; use model.adapter.use: merge"
        )


def _check_training(train: Train, device: torch.device) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in train.trackers:  # accelerate would silently skip one that is not installed
        if name not in available:
            advice = "is not installed; install it" if name in LOGGER_TYPE_TO_CLASS else "is unknown; correct it"
            installed = ", ".join(available) or "none"
            raise ValueError(f"train.trackers: {name} {advice}, or leave it out (there are: {installed})")
    if train.sharding != "none":
        _check_sharding(train)
    if train.compile:
        compile.check(device)
    parameters = [nn.Parameter(torch.zeros(1))]  # the optimizer checks for its package
    build_optimizer(parameters, train.optimizer, lr=train.lr, betas=(0.9, 0.999), weight_decay=0.0)
