"""The command `evaluate`: compare a base model with the trained one."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from mmalign import atomic_io
from mmalign.atomic_io import atomic_write
from mmalign.commands import preflight
from mmalign.commands._trained import TrainedModel, find_trained
from mmalign.config import Evaluate, Recipe
from mmalign.data.data_module import Splits
from mmalign.data.pairs import fingerprint_pairs
from mmalign.evaluation.metrics import Table
from mmalign.methods import Requirements, requirements_of
from mmalign.modalities import SAMPLES, Result, loading, modality_of
from mmalign.training.export import RunInfo
from mmalign.training.launch import GOES_ON, name_lost_processes
from mmalign.training.processes import connect_processes, current_processes

RESULT = "result.json"  # in every folder of an evaluation
TABLE = "table.json"  # the table of an evaluation of a trained model, with its identity
PAIR_BENCHMARKS = ("implicit", "judge", "steps")  # on the validation split of the training data

logger = logging.getLogger(__name__)


class StoredTable(TypedDict):
    """Content of `table.json`: `of` is the identity of the evaluation."""

    of: dict[str, object]
    table: Table


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


def evaluate(recipe: Recipe, *, checkpoint: str | int | None = None) -> Evaluation:
    """Compare the base model with the trained one on the recipe's benchmark, and write `evaluation/` in its output.

    Args:
        recipe: the recipe.
        checkpoint: "best" or the updates of one of the run's checkpoints, written to `evaluation-00000010/`; None for
            the model at the end of the run.

    Raises:
        ValueError: the recipe has no `evaluate` section, a file of it is missing or invalid, or there is no trained
            model.
        ConnectionError: another process of the launch ended or stopped answering.
    """
    section, modality = recipe.evaluate, modality_of(recipe)
    if section is None:
        raise ValueError(
            f"evaluate: the recipe has no such section; add one, for example {modality.example_evaluation}"
        )
    of_pairs = section.benchmark in PAIR_BENCHMARKS
    if of_pairs and not recipe.data.validation_fraction:
        needed = "needs a validation split; set data.validation_fraction, for example to 0.1"
        raise ValueError(f"evaluate: {section.benchmark} {needed}")
    preflight.check(recipe, "evaluation", data=of_pairs)
    minutes = recipe.limits.rank_timeout
    connect_processes(minutes)
    # Scores of answer files, or a trained model to generate with
    scored = modality.score_files(recipe)
    trained = find_trained(recipe, checkpoint) if scored is None else None  # nothing is written without a trained model
    output = atomic_io.make_folder("output", Path(recipe.output))
    with atomic_io.folder_lock(output), name_lost_processes(minutes, lambda: GOES_ON):
        folder = output / f"evaluation{trained.suffix if trained is not None else ''}"
        atomic_io.check_owned(folder, RESULT)
        if trained is not None:
            return _write(_measure_models(recipe, section, trained), folder)
        assert scored is not None
        return _write(lambda _: scored, folder)


def _write(measure: Callable[[Path], Result], folder: Path) -> Evaluation:
    """Measure, and write the evaluation to `folder`, in the main process of a launch."""
    # Other processes share the work; the main one keeps the files
    if not current_processes().is_main:
        with tempfile.TemporaryDirectory() as unused:
            result, table = measure(Path(unused))
        current_processes().gather(None)
        return Evaluation(folder, result, table)
    with atomic_write(folder, marker=RESULT) as part:
        part.mkdir()
        result, table = measure(part)
        (part / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")
    current_processes().gather(None)  # no process ends before the files are there
    for row in table:
        logger.info("  ".join(cell.ljust(22) for cell in row).rstrip())
    return Evaluation(folder, result, table)


def _measure_models(recipe: Recipe, section: Evaluate, trained: TrainedModel) -> Callable[[Path], Result]:
    """Return the measure of the models, from a folder for its files; the benchmark is opened before they are loaded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modality, splits = modality_of(recipe), None
    if section.benchmark in PAIR_BENCHMARKS:
        # Any method's model has an implicit reward of pairs; a judge has labels of its own
        needs = Requirements() if section.benchmark == "implicit" else requirements_of(recipe.method)
        splits = modality.open_pairs(recipe, needs)
        _check_unseen(splits, trained)
    measure = modality.open_benchmark(recipe, device, splits)
    family = loading.load_model(recipe, device)
    policy = trained.load(family)
    _warn_of_other_parts(recipe, trained, family)

    def measure_trained(folder: Path) -> Result:
        of = _identity(section, trained.info)
        result, table = measure(policy, folder, of)
        (folder / TABLE).write_text(json.dumps(StoredTable(of=of, table=table), indent=1), encoding="utf-8")
        # Not the recipe of this command
        return {**result, "model": trained.recipe.model.path, "method": trained.recipe.method.name}, table

    return measure_trained


def _warn_of_other_parts(recipe: Recipe, trained: TrainedModel, family: Any) -> None:
    """Name the parts of the base model, besides its network, that are not those of the training."""
    was, now = trained.info.identity, modality_of(recipe).model_dependencies(recipe.model, family)
    differs = [key for key, value in now.items() if was.get(key, value) != value]
    if differs and was.get("precision") == recipe.train.precision:
        logger.warning(
            f"model.path: {family.name} has {' and '.join(differs)} other than in the training; both models are "
            "measured with those of today"
        )


def _check_unseen(splits: Splits, model: TrainedModel) -> None:
    """Check that the trained model has not seen the pairs of the validation split or their prompts.

    Raises:
        ValueError: validation pairs are among those of the training, or nobody can say whether they are.
    """
    train, validation = splits
    recorded = model.info.identity["pairs"]
    if validation is None or fingerprint_pairs(train) == recorded:
        return
    # Pairs of the training, opened again by its recipe
    trained = model.recipe
    seen, _ = modality_of(trained).open_pairs(trained, requirements_of(trained.method))
    if fingerprint_pairs(seen) != recorded:
        raise ValueError(
            f"data.path: {trained.data.path} no longer has the pairs that the model was trained on, so that nobody can "
            "say whether it has seen these validation pairs; train again"
        )
    contents = {pair.content for pair in seen}
    # A method that generates its images was trained on prompts alone, the first part of a pair's content
    overlap = sum(pair.content in contents or pair.content[:1] in contents for pair in validation)
    if overlap:
        raise ValueError(
            f"data.validation_fraction: the model was trained on {overlap:,} of the {len(validation):,} validation "
            f"pairs; expected the split of its training (validation_fraction {trained.data.validation_fraction:g}, "
            f"train.seed {trained.train.seed}), or pairs of another file"
        )


def _identity(section: Evaluate, trained: RunInfo) -> dict[str, object]:
    """Return the identity of an evaluation: the trained model and the settings."""
    return {"trained": asdict(trained), "evaluate": section.model_dump()}


def is_evaluated(recipe: Recipe, *, checkpoint: str | int | None = None) -> bool:
    """Return whether the recipe's trained model has been evaluated with the recipe's settings.

    Raises:
        ValueError: there is no trained model, or a file of its evaluation is damaged.
    """
    assert recipe.evaluate is not None
    trained, samples = find_trained(recipe, checkpoint), modality_of(recipe).samples
    assert samples is not None, "only evaluations with samples are asked for"
    folder = Path(recipe.output) / f"evaluation{trained.suffix}"
    wanted = json.loads(json.dumps(_identity(recipe.evaluate, trained.info)))
    return (folder / SAMPLES).exists() and samples.read(folder)["of"] == wanted
