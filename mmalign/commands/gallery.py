"""The command `gallery`: write an HTML page of base and trained outputs side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from mmalign.atomic_io import folder_lock, make_folder
from mmalign.commands._trained import TrainedModel, find_trained
from mmalign.commands.evaluate import evaluate, is_evaluated
from mmalign.config import Recipe
from mmalign.modalities import Samples, modality_of
from mmalign.pages.page import write_page
from mmalign.pages.ranking import spread

logger = logging.getLogger(__name__)


def gallery(recipe: Recipe, *, checkpoint: str | int | None = None) -> Path:
    """Write the page of an evaluation, which is run first if it is missing, to `gallery/`.

    With more samples than `gallery.images`, the page shows the best gains and the worst regressions, half of each.

    Args:
        recipe: the recipe.
        checkpoint: "best" or the updates of one of the run's checkpoints, shown in `gallery-00000010/`; None for the
            model at the end of the run.

    Raises:
        ValueError: the benchmark has no samples to show, or the evaluation fails.
    """
    modality, parts = modality_of(recipe), modality_of(recipe).samples
    if parts is None:
        raise ValueError("method: a judge generates no images to show; `mmalign evaluate` prints its numbers")
    reason = parts.unavailable_reason(recipe) if recipe.evaluate is not None else "the recipe has no such section"
    if reason is not None:
        raise ValueError(
            f"evaluate: {reason}; a gallery shows a benchmark's samples, for example {modality.example_evaluation}"
        )
    trained = find_trained(recipe, checkpoint)  # nothing is written without a trained model
    with folder_lock(make_folder("output", Path(recipe.output))):
        if not is_evaluated(recipe, checkpoint=checkpoint):
            evaluate(recipe, checkpoint=checkpoint)
        return _write_gallery(recipe, parts, trained)


def _write_gallery(recipe: Recipe, parts: Samples, trained: TrainedModel) -> Path:
    """Write the page in the locked output folder."""
    folder, target = (Path(recipe.output) / f"{kind}{trained.suffix}" for kind in ("evaluation", "gallery"))
    # The evaluation's samples
    content = parts.read(folder)
    samples = content["samples"]

    # The page of those with the largest changes
    scores = [(sample["before"]["score"], sample["after"]["score"]) for sample in samples]
    chosen = spread([after - before for before, after in scores], recipe.gallery.images)
    page = write_page(
        target,
        parts.entries(recipe, folder, [(index, samples[index]) for index in chosen]),
        parts.layout,
        title=recipe.gallery.title or _title(trained),
        summary=content["table"],
        score_name=content["score"],
        provenance={**_training(trained), **parts.provenance(recipe, len(samples))},
        measured=scores,
        benchmarks=[parts.benchmark_of(sample) for sample in samples],
    )
    logger.info(f"gallery: {page}")
    return page


def _title(trained: TrainedModel) -> str:
    """Return the title of a run's page: its model and its method."""
    return f"{Path(trained.recipe.model.path).name} before and after {trained.recipe.method.name}"


def _training(trained: TrainedModel) -> dict[str, str]:
    """Return the settings of model, method and training, as the trained model records them."""
    info, recipe = trained.info, trained.recipe
    done = f"{info.step} updates of {trained.pairs_per_update} pairs"
    settings = {
        "model": recipe.model.path,
        "method": _words({"name": recipe.method.name, **recipe.method.model_dump(exclude_defaults=True)}),
        "training": f"{recipe.model.tune}, {done}, lr {recipe.train.lr:g}",
        "pairs": recipe.data.path,
    }
    if info.record.changes:
        settings["changed"] = "; ".join(map(str, info.record.changes))
    return settings


def _words(settings: Mapping[str, object]) -> str:
    """Return settings as "beta 3000.0, loss (name dpo, label_smoothing 0.0)"."""
    values = {key: f"({_words(value)})" if isinstance(value, Mapping) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in values.items())
