"""The command `quickstart`: pairs, training, evaluation and gallery of a bundled model, without a network."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from mmalign.atomic_io import write_json
from mmalign.commands import evaluate, gallery, prepare, train
from mmalign.commands.load_recipe import load_recipe
from mmalign.console import muted

logger = logging.getLogger(__name__)

MODALITIES = ("text_to_image", "vision_language")
RECIPE = "configs/{}/quickstart.yaml"


def quickstart(
    modality: str = "text_to_image", *, seed: int = 0, generate: bool = False, output: Path | None = None
) -> dict[str, Any]:
    """Align a bundled model, evaluate it, and write the numbers and a gallery.

    The evaluation measures whether images follow their prompts, or how much answers hallucinate.

    Args:
        modality: "text_to_image" (tiny_sd) or "vision_language" (tiny_llava).
        seed: seed of the training.
        generate: true to generate the pairs instead of reading those in assets/.
        output: folder of all files, instead of the recipe's; `result.json` there has the numbers.

    Returns:
        The content of `result.json`: the numbers of both models on prompts or images outside the training data, and
        the paired differences with 95 % intervals.

    Raises:
        ValueError: the modality is unknown.
    """
    if modality not in MODALITIES:
        raise ValueError(f"quickstart: {modality!r} is not a modality; expected {' or '.join(MODALITIES)}")
    started, source = time.time(), RECIPE.format(modality)
    settings = [f"train.seed={seed}", *([f"output={json.dumps(str(output))}"] if output else [])]
    recipe = load_recipe(source, settings)
    folder = Path(recipe.output)
    # Bundled pairs, or pairs generated here
    if generate:
        pairs = folder / f"pairs{Path(recipe.data.path).suffix}"
        recipe = load_recipe(source, [*settings, f"data.path={json.dumps(str(pairs))}"])
        if not pairs.is_file():
            prepare.prepare(recipe)
    # The commands of any recipe
    trained = train.train(recipe)
    details = evaluate.evaluate(recipe).result
    with muted():  # the last line names the page
        page = gallery.gallery(recipe)
    # Numbers, picture and closing lines
    numbers, sentences = (_image_summary if modality == "text_to_image" else _answer_summary)(details)
    result = {
        "seed": seed,
        "seconds": round(time.time() - started),
        "updates": trained.steps,
        **numbers,
        "details": details,
    }
    write_json(folder / "result.json", result)
    shutil.copyfile(page.with_name("gallery.png"), folder / "gallery.png")
    for sentence in sentences:
        logger.info(sentence)
    logger.info(f"gallery: {page}   numbers: {folder / 'result.json'}   ({time.time() - started:.0f} s)")
    return result


def _image_summary(details: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the first entries of result.json for images, and their sentences."""
    overall = details["overall"]
    base, aligned, difference = overall["before"], overall["after"], overall["difference"]
    numbers = {"base accuracy": base["estimate"], "aligned accuracy": aligned["estimate"], "difference": difference}
    return numbers, [_sentence("prompts rendered correctly", base, aligned, difference)]


# First entries of result.json for answers: measure -> (key, label of its sentence).
_FIRST = {
    "CHAIR_s": ("CHAIR_s", "descriptions with an invented object"),
    "CHAIR_i": ("CHAIR_i", "invented among the named objects"),
    "recall": ("recall", "objects of the image that are named"),
    "mean: accuracy": ("POPE accuracy", "yes/no questions answered correctly"),
}


def _answer_summary(details: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the first entries of result.json for answers, and their sentences."""
    numbers, sentences = dict[str, Any](), list[str]()
    for compared in details["measures"].values():
        base, aligned = (compared[side]["measures"] for side in ("before", "after"))
        for name, difference in compared["difference"].items():
            if name in _FIRST:
                key, label = _FIRST[name]
                numbers[key] = {"base": base[name], "aligned": aligned[name], "difference": difference}
                sentences.append(_sentence(label, *numbers[key].values()))
    return numbers, sentences


def _sentence(label: str, base: dict[str, float], aligned: dict[str, float], difference: dict[str, float]) -> str:
    change, low, high = (100 * difference[end] for end in ("estimate", "low", "high"))
    return (
        f"{label}: {base['estimate']:.1%} before, {aligned['estimate']:.1%} after; "
        f"{change:+.1f} points, 95 % interval [{low:.1f}, {high:.1f}]"
    )
