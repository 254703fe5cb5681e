"""The step judge: a reward model of noisy images, trained beside the frozen text-to-image model that makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmalign.config import EvaluateSteps, ImageData, JudgeModel, Model, Recipe
from mmalign.config.methods import StepPreferenceConfig
from mmalign.data.data_module import DataModule
from mmalign.evaluation.benchmarks import step_accuracy
from mmalign.families import loading, step_judge
from mmalign.families.step_judge import StepJudge
from mmalign.families.types import Loading
from mmalign.modalities import Measure, Modality, Result
from mmalign.modalities.loading import DTYPES
from mmalign.modalities.prompts import located
from mmalign.modalities.text_to_image import check, data
from mmalign.modalities.validation import build_validation_data
from mmalign.policy import Policy
from mmalign.resources import resolve_model


def check_recipe(recipe: Recipe) -> None:
    """Check the settings that depend on the modality.

    Raises:
        ValueError: the recipe compiles the network or packs responses.
    """
    if recipe.train.compile:
        raise ValueError(step_judge.NOT_COMPILED)
    check.check_packing(recipe)


def check_model(model: Model) -> None:
    """Check the models' paths and the class of the frozen model's pipeline, perhaps with a query to the Hub.

    Raises:
        ValueError: a path is not found, or no adapter knows the class.
    """
    assert isinstance(model, JudgeModel)
    located("model.path", model.path)
    if model.vae is not None:
        located("model.vae", model.vae)
    loading.pipeline_class(located("model.denoiser", model.denoiser), model.revision)


def load_family(model: Model, options: Loading) -> StepJudge:
    """Load the reward model and the frozen text-to-image model.

    Raises:
        ValueError: a model cannot be loaded.
    """
    assert isinstance(model, JudgeModel)
    vae = resolve_model(model.vae) if model.vae is not None else None
    frozen = replace(options, vae=vae, vae_dtype=DTYPES[model.vae_dtype], network_half=True)
    return step_judge.load(model.path, loading.load_family(resolve_model(model.denoiser), frozen), options)


def frozen_models(model: Model) -> dict[str, str]:
    """Return the path of the frozen model."""
    assert isinstance(model, JudgeModel)
    return {"denoiser": model.denoiser}


def build_data_module(family: StepJudge, *args: Any, **options: Any) -> DataModule:
    """Return the pairs as the frozen model encodes them."""
    return data.build_data_module(family.denoiser, *args, **options)


def open_benchmark(recipe: Recipe, _: torch.device) -> Measure:
    """Open the validation split; return the measure of the judge's accuracy at several timesteps.

    Raises:
        ValueError: the pairs cannot be read.
    """
    section, cfg = recipe.evaluate, recipe.method
    assert isinstance(section, EvaluateSteps) and isinstance(recipe.data, ImageData)
    assert isinstance(cfg, StepPreferenceConfig)
    splits = data.open_pairs(recipe.data, recipe.train.seed)

    def measure(policy: Policy[StepJudge], *_: object) -> Result:
        batches = build_validation_data(recipe, policy, splits, cfg).validation_batches()
        accuracy = step_accuracy.accuracy(policy, batches, section.times, guidance=cfg.guidance, seed=section.seed)
        return accuracy.as_dict(), accuracy.table()

    return measure


MODALITY = Modality(
    check=check_recipe,
    check_data=check.check_data,
    check_model=check_model,
    uncacheable_reason=check.uncacheable_reason,
    load_family=load_family,
    frozen_models=frozen_models,
    open_pairs=data.open_pairs,
    build_data_module=build_data_module,
    unusable_rows="images could not be read",
    open_benchmark=open_benchmark,
    score_files=lambda _: None,
    samples=None,
    prepare=None,
    takes_writer=False,
    example_evaluation="{benchmark: steps}",
    example_preparation="",
)
