"""The command `gallery`: write an HTML page of base and trained outputs side by side."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mmalign.atomic_io import write_error
from mmalign.commands.evaluate import _example, evaluate, is_evaluated
from mmalign.config import Evaluate, EvaluateImages, EvaluateResponses, Recipe
from mmalign.modalities.text_to_image import evaluate as evaluate_images
from mmalign.modalities.vision_language import evaluate as evaluate_responses
from mmalign.pages import answers, pictures
from mmalign.pages.page import write_page
from mmalign.pages.ranking import spread

logger = logging.getLogger(__name__)


def gallery(recipe: Recipe) -> Path:
    """Write the page of an evaluation, which is run first if it is missing, to `gallery/`.

    With more samples than `gallery.images`, the page shows the best gains and the worst regressions, half of each.

    Raises:
        ValueError: the benchmark has no samples to show, or the evaluation fails.
    """
    section = recipe.evaluate
    if section is None or (nothing := _no_gallery_reason(section)):
        came = nothing if section is not None else "the recipe has no such section"
        raise ValueError(f"evaluate: {came}; a gallery shows a benchmark's samples, for example {_example(recipe)}")
    if not is_evaluated(recipe):
        evaluate(recipe)
    folder = Path(recipe.output) / "evaluation"
    content = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    samples = content["samples"]
    scores = [(sample["before"]["score"], sample["after"]["score"]) for sample in samples]
    chosen = spread([after - before for before, after in scores], recipe.gallery.images)
    target = Path(recipe.output) / "gallery"
    about: dict[str, Any] = {
        "title": recipe.gallery.title,
        "summary": content["table"],
        "score_name": content["score"],
        "provenance": _provenance(recipe, section, len(samples)),
        "measured": scores,
    }
    try:
        if isinstance(section, EvaluateResponses):
            entries = evaluate_responses.gallery_entries(section, [samples[i] for i in chosen])
            page = write_page(target, entries, answers.LAYOUT, **about)
        else:
            image_entries = evaluate_images.gallery_entries(folder, [(i, samples[i]) for i in chosen])
            page = write_page(target, image_entries, pictures.LAYOUT, **about)
    except OSError as error:
        raise write_error(target, error) from error
    logger.info(f"gallery: {page}")
    return page


def _no_gallery_reason(section: Evaluate) -> str | None:
    """Return the reason why an evaluation has no samples to show, or None if it has."""
    if section.benchmark == "steps":
        return "benchmark steps draws no pictures"
    pictures = isinstance(section, EvaluateImages)
    if section.benchmark == "implicit":
        return f"benchmark implicit {'draws no pictures' if pictures else 'asks no question'}"
    scored = isinstance(section, EvaluateResponses) and section.answers is not None
    return "answers that are there already are scored and not shown" if scored else None


def _provenance(recipe: Recipe, section: Evaluate, number: int) -> dict[str, str]:
    """Return the model, training and sampling settings behind a page's entries."""
    train = recipe.train
    pairs = train.batch_size * train.gradient_accumulation_steps
    provenance = {
        "model": recipe.model.path,
        "method": ", ".join(f"{k} {v}" for k, v in recipe.method.model_dump().items()),
        "training": f"{recipe.model.tune}, {train.steps} updates of {pairs} pairs, lr {train.lr:g}",
        "pairs": recipe.data.path,
    }
    if isinstance(section, EvaluateResponses):
        decoding = section.decoding
        how = f"sampled at temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
        answers = f"{how}, at most {decoding.max_new_tokens} tokens"
        return {
            **provenance,
            "answers": answers,
            "questions": f"{number} of {section.benchmark}, the same to both models",
        }
    assert isinstance(section, EvaluateImages)
    sampling = section.sampling
    return {
        **provenance,
        "sampler": f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}",
        "samples": f"{number} evaluated; both models start from the same noise",
    }
