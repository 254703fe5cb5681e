"""The command `evaluate`: compare a base model with the trained one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign import atomic_io
from mmalign.atomic_io import atomic_write
from mmalign.commands import preflight
from mmalign.config import Evaluate, Recipe
from mmalign.evaluation.metrics import Table
from mmalign.modalities import Result, loading, modality_of
from mmalign.training.export import RunInfo, check_base_model, read_run_info

logger = logging.getLogger(__name__)


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
    section, modality = recipe.evaluate, modality_of(recipe)
    if section is None:
        raise ValueError(
            f"evaluate: the recipe has no such section; add one, for example {modality.example_evaluation}"
        )
    of_pairs = section.benchmark in ("implicit", "steps")
    if of_pairs and not recipe.data.validation_fraction:
        needed = "needs a validation split; set data.validation_fraction, for example to 0.1"
        raise ValueError(f"evaluate: {section.benchmark} {needed}")
    preflight.check(recipe, data=of_pairs)
    scored = modality.score_files(recipe)
    measure = _measure_models(recipe, section) if scored is None else lambda _: scored
    folder = atomic_io.make_folder("output", Path(recipe.output)) / "evaluation"
    with atomic_write(folder) as part:
        part.mkdir()
        result, table = measure(part)
        (part / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for row in table:
        logger.info("  ".join(cell.ljust(22) for cell in row).rstrip())
    return Evaluation(folder, result, table)


def _measure_models(recipe: Recipe, section: Evaluate) -> Callable[[Path], Result]:
    """Return the measure of the models, from a folder for its files; the benchmark is opened before they are loaded."""
    device, trained = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(recipe.output) / "model"
    info = read_run_info(trained)
    measure = modality_of(recipe).open_benchmark(recipe, device)
    family = loading.load_model(recipe, device)
    check_base_model(info, trained, family)
    policy = loading.load_trained_policy(family, trained)
    return lambda folder: measure(policy, folder, _identity(section, info))


def _identity(section: Evaluate, trained: RunInfo) -> dict[str, object]:
    """Return the identity of an evaluation: the trained model and the settings."""
    return {"trained": asdict(trained), "evaluate": section.model_dump()}


def is_evaluated(recipe: Recipe) -> bool:
    """Return whether the recipe's trained model has been evaluated with the recipe's settings.

    Raises:
        ValueError: there is no trained model.
    """
    assert recipe.evaluate is not None
    file = Path(recipe.output) / "evaluation" / "samples.json"
    wanted = json.loads(json.dumps(_identity(recipe.evaluate, read_run_info(Path(recipe.output) / "model"))))
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("of") == wanted
