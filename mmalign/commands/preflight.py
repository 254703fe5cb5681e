"""Checks of a recipe before any model is loaded: files, columns, devices, packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign import methods
from mmalign.attention import choice
from mmalign.config import (
    Coco,
    Data,
    EvaluateImages,
    EvaluateResponses,
    Files,
    ImageData,
    ImageModel,
    JudgeModel,
    PrepareImages,
    Recipe,
    ResponseData,
    RewardConfig,
    Train,
)
from mmalign.data.formats import images, prompts, responses
from mmalign.families import compile, step_judge
from mmalign.families import loading as families
from mmalign.modalities.loading import DTYPES, method_reward
from mmalign.modalities.prompts import _located, read_prompt_pairs, read_prompts
from mmalign.resources import locate, resolve
from mmalign.rewards import reward_module
from mmalign.training.optim import build_optimizer


def check(recipe: Recipe, *, data: bool = True, training: bool = False) -> None:
    """Check all that needs no model: files, columns, classes, devices, packages.

    Args:
        recipe: the recipe to check.
        data: true to check the preference pairs too; generating images needs none.
        training: true to check what only training needs: batch size, compilation, optimizer and trackers.

    Raises:
        ValueError: a check fails; the message names the key, the value, the expectation and the remedy.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; expected a folder, or a name that is free")
    check_precision(recipe.train)
    if recipe.train.pack_responses != "auto" and isinstance(recipe.model, ImageModel | JudgeModel):
        raise ValueError(
            f"train.pack_responses: {recipe.train.pack_responses} is about responses that share a prompt, and "
            "method.name: "
            f"{recipe.method.name} compares images; leave it out"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice.check(recipe.train.attention, device, DTYPES[recipe.train.precision])
    if training:
        if recipe.train.compile and isinstance(recipe.model, JudgeModel):
            raise ValueError(step_judge.NOT_COMPILED)
        _check_training(recipe.train, device)
        least = methods.requirements_of(recipe.method).min_pairs
        if recipe.train.batch_size < least:
            raise ValueError(
                f"train.batch_size: method.name: {recipe.method.name} compares the pairs of a batch with one another; "
                f"expected at least {least}, got {recipe.train.batch_size}"
            )
    _check_prompts_only(recipe)
    if data:
        check_data(recipe.data)
    if isinstance(recipe.evaluate, EvaluateImages):
        _check_image_sampling("evaluate", recipe.evaluate)
    if isinstance(recipe.evaluate, EvaluateResponses):
        _check_question_files(recipe.evaluate)
    if isinstance(recipe.prepare, PrepareImages):
        _check_image_sampling("prepare", recipe.prepare)
    if (named := method_reward(recipe)) is not None:
        _check_reward_model("method.reward", named)
    # Last, since it may query the Hub.
    path = _located("model.path", recipe.model.path)
    if isinstance(recipe.model, ImageModel | JudgeModel):
        if recipe.model.vae is not None:
            _located("model.vae", recipe.model.vae)
        if isinstance(recipe.model, JudgeModel):
            path = _located("model.denoiser", recipe.model.denoiser)
        families.pipeline_class(path, recipe.model.revision)
    else:
        families.model_type(path, recipe.model.revision)


def check_precision(options: Train) -> None:
    """Refuse float16 without a GPU.

    Raises:
        ValueError: the precision is float16 and there is no GPU.
    """
    if options.precision == "float16" and not torch.cuda.is_available():
        raise ValueError("train.precision: float16 needs a GPU; use bfloat16 or float32")


def check_data(data: Data) -> None:
    """Check that the pairs' files exist and have their columns, and that the cache setting fits.

    Raises:
        ValueError: a check fails; the message names the key, the value, the expectation and the remedy.
    """
    if data.cache not in ("off", "auto") and Path(data.cache).exists() and not Path(data.cache).is_dir():
        raise ValueError(f"data.cache: {data.cache} is a file; expected a folder, or a name that is free")
    if isinstance(data, ResponseData):
        responses.check_responses(
            data.format,
            locate(data.path),
            split=data.split,
            columns=data.columns,
            group_by=data.group_by,
            images=Path(data.images) if data.images is not None else None,
        )
        return
    assert isinstance(data, ImageData)
    if data.format == "prompts":
        prompts.open_prompts(locate(data.path))
        return
    images.check_source(data.format, locate(data.path), split=data.split, columns=data.columns, group_by=data.group_by)
    if data.crop == "random" and data.cache not in ("off", "auto"):
        raise ValueError(
            f"data.cache: {data.cache} cannot be used with data.crop: random, which is never the same twice; "
            "use cache: off"
        )


def _check_prompts_only(recipe: Recipe) -> None:
    """Refuse settings of `data` that a method that generates its images does not read."""
    if not methods.requirements_of(recipe.method).prompts_only:
        return
    data, unread = recipe.data, ["group_by", "max_bad_images", "num_workers", "crop", "flip"]
    from_text = isinstance(data, ImageData) and data.format == "prompts"
    unread += ["split", "columns"] if from_text else []
    given = [name for name in unread if getattr(data, name) != type(data).model_fields[name].default]
    if given:
        source = "a text file with one a line (data.format: prompts)" if from_text else "the pairs of data.path"
        raise ValueError(
            f"data.{given[0]}: means nothing here: method.name: {recipe.method.name} draws its own images, and takes "
            f"prompts alone, from {source}; leave {' and '.join(given)} out"
        )


def _check_training(train: Train, device: torch.device) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in train.trackers:  # accelerate would silently skip one that is not installed
        if name not in available:
            advice = "is not installed; install it" if name in LOGGER_TYPE_TO_CLASS else "is unknown; correct it"
            installed = ", ".join(available) or "none"
            raise ValueError(f"train.trackers: {name} {advice}, or leave it out (there are: {installed})")
    if train.compile:
        compile.check(device)
    parameters = [nn.Parameter(torch.zeros(1))]  # the optimizer checks for its package
    build_optimizer(parameters, train.optimizer, lr=train.lr, betas=(0.9, 0.999), weight_decay=0.0)


def _check_image_sampling(name: str, section: EvaluateImages | PrepareImages) -> None:
    """Check a section that generates and scores images: reward model, prompts and image size."""
    if section.reward is not None:
        _check_reward_model(f"{name}.reward", section.reward)
    contrast = isinstance(section, PrepareImages) and section.prompt_pairs
    _check_prompts(f"{name}.prompts", section.prompts, read_prompt_pairs if contrast else read_prompts)
    side = section.sampling.resolution or 0
    if side % 8:
        raise ValueError(f"{name}.sampling.resolution: expected a multiple of 8 pixels, got {side}")


def _check_reward_model(key: str, config: RewardConfig) -> None:
    reward_module(config.name)
    if "/" in config.path:  # else the name of a model in the reward model's library
        _located(f"{key}.path", config.path)


def _check_question_files(section: EvaluateResponses) -> None:
    """Check the files that a section of questions names."""
    named: dict[str, Files | None] = {"questions": section.questions}
    if isinstance(section.annotations, Coco):
        for key in ("instances", "captions"):
            named[f"annotations.{key}"] = {name: name for name in getattr(section.annotations, key)}
    else:
        named["annotations"] = section.annotations
    if section.answers is not None:
        named |= {f"answers.{side}": getattr(section.answers, side) for side in ("before", "after")}
    for key, files in named.items():
        for file in [files] if isinstance(files, str) else (files or {}).values():
            _located(f"evaluate.{key}", file, resolve)
    if section.images is not None and not Path(section.images).is_dir():
        raise ValueError(
            f"evaluate.images: {section.images} is no folder; expected the one that images' names begin in"
        )


def _check_prompts(key: str, source: int | str, read: Callable[[str, str], Any]) -> None:
    if isinstance(source, str):
        read(key, source)
    elif source < 1:
        raise ValueError(f"{key}: expected at least 1, or a file with one prompt a line, got {source}")
