"""The command `evaluate`: compare a base model with the trained one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign import atomic_io
from mmalign.atomic_io import atomic_write
from mmalign.commands import preflight
from mmalign.config import Evaluate, EvaluateImages, EvaluateResponses, EvaluateSteps, ImageModel, JudgeModel, Recipe
from mmalign.data.data_module import DataModule, Splits
from mmalign.evaluation.benchmarks import implicit_reward, step_accuracy
from mmalign.modalities import loading
from mmalign.modalities.data import build_data_module, open_data
from mmalign.modalities.text_to_image import evaluate as evaluate_images
from mmalign.modalities.vision_language import evaluate as evaluate_responses
from mmalign.policy import Policy
from mmalign.training.export import check_base_model, read_run_info

logger = logging.getLogger(__name__)


Table = list[tuple[str, ...]]


Measure = Callable[[Path], tuple[dict[str, Any], Table]]  # from the folder for its files


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        folder: folder of `result.json`, `samples.json` and the images.
        result: the content of `result.json`.
        table: rows of text, the header first.
    """

    folder: Path
    result: dict[str, Any]
    table: Table


def evaluate(recipe: Recipe) -> Evaluation:
    """Compare the base model with the trained one on the recipe's benchmark, and write `evaluation/` in its output.

    Raises:
        ValueError: the recipe has no `evaluate` section, a file of it is missing or invalid, or there is no trained
            model.
    """
    section = recipe.evaluate
    if section is None:
        raise ValueError(f"evaluate: the recipe has no such section; add one, for example {_example(recipe)}")
    of_pairs = section.benchmark in ("implicit", "steps")
    if of_pairs and not recipe.data.validation_fraction:
        needed = "needs pairs kept from training; set data.validation_fraction, for example to 0.1"
        raise ValueError(f"evaluate: {section.benchmark} {needed}")
    preflight.check(recipe, data=of_pairs)
    measure = _measure_files(section) or _measure_models(recipe, section)
    folder = atomic_io.make_folder("output", Path(recipe.output)) / "evaluation"
    with atomic_write(folder) as part:
        part.mkdir()
        result, table = measure(part)
        (part / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for row in table:
        logger.info("  ".join(cell.ljust(22) for cell in row).rstrip())
    return Evaluation(folder, result, table)


def _example(recipe: Recipe) -> str:
    if isinstance(recipe.model, JudgeModel):
        return "{benchmark: steps}"
    is_image_model = isinstance(recipe.model, ImageModel)
    return "{benchmark: scenes, prompts: 256}" if is_image_model else "{benchmark: crowds, num_images: 256}"


def _measure_files(section: Evaluate) -> Measure | None:
    """Return the measure of the answers that a section names, or None without answers."""
    if not isinstance(section, EvaluateResponses) or section.answers is None:
        return None
    scored = evaluate_responses.score_files(section)
    return lambda _: scored


def _measure_models(recipe: Recipe, section: Evaluate) -> Measure:
    """Return the measure of the models; questions and reward model are loaded before the models."""
    device, trained = _device(), Path(recipe.output) / "model"
    about = read_run_info(trained)
    splits = benchmark = reward_model = None
    if section.benchmark in ("implicit", "steps"):
        splits = open_data(recipe.data, recipe.train.seed)
    elif isinstance(section, EvaluateResponses):
        benchmark = evaluate_responses.open_benchmark(section)
    elif isinstance(section, EvaluateImages) and section.reward:
        reward_model = loading.build_reward_model(section.reward, device)
    family = loading.load_model(recipe, device)
    check_base_model(about, trained, family)
    policy = loading.load_trained_policy(family, trained)
    identity = _identity(section, about)
    if splits is not None:
        measured = _steps if isinstance(section, EvaluateSteps) else _implicit
        return lambda _: measured(recipe, section, policy, splits)
    if benchmark is not None:
        return lambda folder: evaluate_responses.compare_answers(recipe, policy, benchmark, folder, identity)
    return lambda folder: evaluate_images.compare_images(recipe, policy, reward_model, folder, identity)


def _identity(section: Evaluate, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of an evaluation: the trained model and the settings."""
    return {"trained": dict(trained), "evaluate": section.model_dump()}


def _implicit(recipe: Recipe, section: Evaluate, policy: Policy, splits: Splits) -> tuple[dict[str, Any], Table]:
    """Return the implicit reward accuracy on the validation split.

    A pair is right if the trained model prefers the chosen side by more than the base model does.
    """
    data_module = _data_module(recipe, policy, splits)
    is_image_model = isinstance(section, EvaluateImages)
    score = (implicit_reward.image_scores if is_image_model else implicit_reward.response_scores)(policy.family)
    num_noise_samples = section.num_noise_samples if isinstance(section, EvaluateImages) else 1
    report = implicit_reward.accuracy(
        policy, data_module.validation_batches(), score, num_noise_samples=num_noise_samples, seed=section.seed
    )
    return report.as_dict(), report.table()


def _steps(recipe: Recipe, section: Evaluate, policy: Policy, splits: Splits) -> tuple[dict[str, Any], Table]:
    """Return the accuracy of the trained step judge and of its initial state on the validation split."""
    assert isinstance(section, EvaluateSteps)
    batches = _data_module(recipe, policy, splits, recipe.method).validation_batches()
    accuracy = step_accuracy.accuracy(
        policy, batches, section.times, guidance=recipe.method.guidance, seed=section.seed
    )
    return accuracy.as_dict(), accuracy.table()


def _data_module(recipe: Recipe, policy: Policy, splits: Splits, method: Any = None) -> DataModule:
    """Return the recipe's pairs, encoded, with the inputs that the method requires."""
    from accelerate import Accelerator

    return build_data_module(
        policy.family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accelerator=Accelerator(),
        method=method,
        splits=splits,
    )


def is_evaluated(recipe: Recipe) -> bool:
    """Return whether the recipe's trained model has been evaluated with the recipe's settings.

    Raises:
        ValueError: there is no trained model.
    """
    assert recipe.evaluate is not None
    file = Path(recipe.output) / "evaluation" / "samples.json"
    wanted = json.loads(json.dumps(_identity(recipe.evaluate, read_run_info(Path(recipe.output) / "model"))))
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("of") == wanted


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
