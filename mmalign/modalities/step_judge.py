"""The step judge: a reward model of noisy images, trained beside the frozen text-to-image model that makes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmalign.config import EvaluateSteps, JudgeModel, Model, Recipe
from mmalign.config.methods.judges import StepPreferenceConfig
from mmalign.data.data_module import DataModule, Splits
from mmalign.doctor.corpus import NotChecked, RecipeInputs
from mmalign.evaluation.benchmarks import step_accuracy
from mmalign.families import loading, step_judge
from mmalign.families.precision import warn_if_emulated
from mmalign.families.step_judge import StepJudge
from mmalign.families.types import Loading
from mmalign.methods import requirements_of
from mmalign.modalities import DataRequest, Measure, Modality, Result
from mmalign.modalities.loading import DTYPES
from mmalign.modalities.text_to_image import check, data, doctor, show
from mmalign.modalities.text_to_image.model import frozen_parts
from mmalign.modalities.validation import groups_by_row, validation_batches
from mmalign.policy import Policy
from mmalign.resources import located, resolve_model


def refuse_samples(recipe: Recipe) -> None:
    """Refuse samples, which a step judge does not generate.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"train.sample_every: method.name: {recipe.method.name} generates nothing; leave it out")


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
    warn_if_emulated("model.vae_dtype", model.vae_dtype, options.device)
    # Never trained, so that it needs no float32 masters
    frozen = replace(options, vae=vae, vae_dtype=DTYPES[model.vae_dtype], network_half=True)
    return step_judge.load(model.path, loading.load_family(resolve_model(model.denoiser), frozen), options)


def frozen_models(model: Model, family: StepJudge) -> dict[str, str]:
    """Return the path of the frozen model, and fingerprints of its parts."""
    assert isinstance(model, JudgeModel)
    return {"denoiser": model.denoiser, **frozen_parts(family.denoiser)}


def build_data_module(family: StepJudge, request: DataRequest) -> DataModule:
    """Return the pairs as the frozen model encodes them."""
    return data.build_data_module(family.denoiser, request)


def open_benchmark(recipe: Recipe, _: torch.device, splits: Splits | None) -> Measure:
    """Return the measure of the judge's accuracy at several timesteps, on the validation split."""
    section, cfg = recipe.evaluate, recipe.method
    assert isinstance(section, EvaluateSteps) and isinstance(cfg, StepPreferenceConfig) and splits is not None

    def measure(policy: Policy[StepJudge], *_: object) -> Result:
        batches = validation_batches(recipe, policy, splits, requirements_of(cfg))
        accuracy = step_accuracy.accuracy(
            policy, batches, section.times, groups=groups_by_row(splits), guidance=cfg.guidance, seed=section.seed
        )
        return accuracy.as_dict(), accuracy.table()

    return measure


def doctor_inputs(recipe: Recipe) -> RecipeInputs:
    """Return the count of prompts that the frozen model's text encoder cuts."""
    assert isinstance(recipe.model, JudgeModel)
    count = doctor.count_truncated(recipe.model.denoiser, None)
    return RecipeInputs(NotChecked("the recipe has no validation split"), count, NotChecked("a judge has no responses"))


MODALITY = Modality(
    check=check_recipe,
    loading_hint=lambda _, folder, __: f"reward: {{name: step_aware, path: {folder}}}",
    loaded_by="mmalign",
    pipeline_tag="text-to-image",
    check_data=check.check_data,
    check_model=check_model,
    load_family=load_family,
    model_dependencies=frozen_models,
    open_pairs=data.open_pairs,
    build_data_module=build_data_module,
    show=show.show,
    check_samples=refuse_samples,
    open_benchmark=open_benchmark,
    doctor_inputs=doctor_inputs,
    example_evaluation="{benchmark: steps}",
)
