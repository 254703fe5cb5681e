"""The whole way in one command: pairs, alignment, measurement, gallery, on the bundled model and without a network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmalign import run
from mmalign.recipe import load_recipe

RECIPE = "configs/text_to_image/quickstart.yaml"


def quickstart(*, seed: int, draw: bool, output: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Align tiny_sd by Diffusion-DPO and show by how much its images follow their prompts better.

    Args:
        seed: of the training.
        draw: draw and judge the pairs anew, instead of taking those in assets/.
        output: where everything is written; `result.json` there has the numbers.
        say: takes a line of text.

    Returns:
        What `result.json` holds: accuracy of base and aligned model on held-out prompts, and the paired difference with
        its 95 % interval.
    """
    started = time.time()
    settings = [f"output={json.dumps(str(output))}", f"train.seed={seed}"]
    if draw:
        settings.append(f"data.path={json.dumps(str(output / 'pairs.parquet'))}")
    recipe = load_recipe(RECIPE, settings)
    if draw and not (output / "pairs.parquet").is_file():
        run.prepare(recipe, say)
    trained = run.train(recipe, say)
    result = run.evaluate(recipe, say).result
    page = run.gallery(recipe, say=lambda _: None)
    overall = result["overall"]
    base, aligned, difference = overall["before"], overall["after"], overall["difference"]
    numbers = {"base accuracy": base["estimate"], "aligned accuracy": aligned["estimate"], "difference": difference}
    result = {
        "seed": seed,
        "seconds": round(time.time() - started),
        "updates": trained.steps,
        **numbers,
        "details": result,
    }
    (output / "result.json").write_text(json.dumps(result, indent=1))
    shutil.copyfile(page.with_name("gallery.png"), output / "gallery.png")
    low, high = 100 * difference["low"], 100 * difference["high"]
    say(
        f"prompts drawn right: {base['estimate']:.1%} before, {aligned['estimate']:.1%} after; "
        f"{100 * difference['estimate']:+.1f} points, 95 % interval [{low:.1f}, {high:.1f}]"
    )
    say(f"gallery: {page}   numbers: {output / 'result.json'}   ({time.time() - started:.0f} s)")
    return result
