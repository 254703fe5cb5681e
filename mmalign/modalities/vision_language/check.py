"""Checks of a vision-language recipe that need no model."""

from __future__ import annotations

from pathlib import Path

from mmalign.config import Coco, EvaluateResponses, Files, PrepareResponses, Recipe, ResponseData
from mmalign.data.formats.responses import check_source
from mmalign.methods import requirements_of
from mmalign.modalities.loading import check_reward_model
from mmalign.resources import locate, located, resolve


def check_evaluation(recipe: Recipe) -> None:
    """Check the files of the `evaluate` section.

    Raises:
        ValueError: a file, a folder or a judge is missing or invalid.
    """
    if isinstance(recipe.evaluate, EvaluateResponses):
        section = recipe.evaluate
        _check_question_files(section)
        if section.reward is not None:
            check_reward_model("evaluate.reward", section.reward, responses=True)
        if section.best_of is not None:
            check_reward_model("evaluate.best_of.reward", section.best_of.reward, responses=True)


def check_preparation(recipe: Recipe) -> None:
    """Check the judge of the `prepare` section.

    Raises:
        ValueError: the judge is missing or invalid.
    """
    if isinstance(recipe.prepare, PrepareResponses) and recipe.prepare.judged is not None:
        check_reward_model("prepare.judged.reward", recipe.prepare.judged.reward, responses=True, truths=True)


def check_data(recipe: Recipe) -> None:
    """Check the pairs' file and its columns.

    Raises:
        ValueError: the file or a column is missing.
    """
    data, needs = recipe.data, requirements_of(recipe.method)
    assert isinstance(data, ResponseData)
    check_source(
        data.format,
        locate(data.path),
        images=data.images,
        split=data.split,
        columns=data.columns,
        group_by=data.group_by,
        learning=needs.learns_from,
        cut_pairs=data.cut_pairs,
    )


def _check_question_files(section: EvaluateResponses) -> None:
    """Check the files that a section of questions names."""
    # All files that the section names, by key
    named: dict[str, Files | None] = {"questions": section.questions, "labels": section.labels}
    if isinstance(section.annotations, Coco):
        for key in ("instances", "captions"):
            named[f"annotations.{key}"] = {name: name for name in getattr(section.annotations, key)}
    else:
        named["annotations"] = section.annotations
    if section.answers is not None:
        named |= {f"answers.{side}": getattr(section.answers, side) for side in ("before", "after")}
    # One file, or one for each split
    for key, files in named.items():
        for file in [files] if isinstance(files, str) else (files or {}).values():
            located(f"evaluate.{key}", file, resolve)
    if section.images is not None and not Path(section.images).is_dir():
        raise ValueError(f"evaluate.images: {section.images} is not a folder; expected the folder of the images")
