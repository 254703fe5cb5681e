"""The command `gallery`: write an HTML page of base and trained outputs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.atomic_io import unwritten
from mmalign.commands.evaluate import Say, _example, evaluate, is_evaluated
from mmalign.config import Evaluate, EvaluateImages, EvaluateResponses, Recipe
from mmalign.modalities.text_to_image import evaluate as evaluate_images
from mmalign.modalities.vision_language import evaluate as evaluate_responses
from mmalign.pages import answers, pictures
from mmalign.pages.page import write_page
from mmalign.pages.ranking import spread


def gallery(recipe: Recipe, say: Say = print) -> Path:
    """Write the before-and-after page of the evaluation, made first if there is none, to `gallery/`.

    Where there are more samples than `gallery.images`, half of the page is the best gains and half the worst
    regressions.

    Raises:
        ValueError: the evaluation has nothing to show, or cannot be made.
    """
    section = recipe.evaluate
    if section is None or (nothing := _nothing_to_show(section)):
        came = nothing if section is not None else "the recipe has no such section"
        raise ValueError(f"evaluate: {came}; a gallery shows a benchmark's samples, for example {_example(recipe)}")
    if not is_evaluated(recipe):
        evaluate(recipe, say)
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
            asked = evaluate_responses.gallery_entries(section, [samples[i] for i in chosen])
            page = write_page(target, asked, answers.LAYOUT, **about)
        else:
            drawn = evaluate_images.gallery_entries(folder, [(i, samples[i]) for i in chosen])
            page = write_page(target, drawn, pictures.LAYOUT, **about)
    except OSError as error:
        raise unwritten(target, error) from error
    say(f"gallery: {page}")
    return page


def _nothing_to_show(section: Evaluate) -> str:
    """Why an evaluation leaves nothing for a page; empty if it does."""
    if section.benchmark == "steps":
        return "benchmark steps draws no pictures"
    pictures = isinstance(section, EvaluateImages)
    if section.benchmark == "implicit":
        return f"benchmark implicit {'draws no pictures' if pictures else 'asks no question'}"
    scored = isinstance(section, EvaluateResponses) and section.answers is not None
    return "answers that are there already are scored and not shown" if scored else ""


def _provenance(recipe: Recipe, section: Evaluate, number: int) -> dict[str, str]:
    """What made a page's entries."""
    train = recipe.train
    pairs = train.batch_size * train.accumulate
    made = {
        "model": recipe.model.path,
        "method": ", ".join(f"{k} {v}" for k, v in recipe.method.model_dump().items()),
        "training": f"{recipe.model.tune}, {train.steps} updates of {pairs} pairs, lr {train.lr:g}",
        "pairs": recipe.data.path,
    }
    if isinstance(section, EvaluateResponses):
        decoding = section.decoding
        how = f"sampled at temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
        answers = f"{how}, at most {decoding.max_new_tokens} tokens"
        return {**made, "answers": answers, "questions": f"{number} of {section.benchmark}, the same to both models"}
    assert isinstance(section, EvaluateImages)
    drawing = section.drawing
    return {
        **made,
        "sampler": f"{drawing.sampler}, {drawing.steps} steps, guidance {drawing.guidance:g}",
        "samples": f"{number} evaluated; both models start from the same noise",
    }
