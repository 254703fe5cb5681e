"""Compare text-to-image models by what they draw: from a recipe's section to numbers, files, and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from mmalign import assemble
from mmalign.data.scenes import Truth
from mmalign.evaluation import preference, scenes
from mmalign.evaluation.counts import SIDES, Counts, ratio
from mmalign.families import Sampling, TextToImage
from mmalign.page.pictures import Entry
from mmalign.policy import Policy
from mmalign.report import tracked
from mmalign.rewards import Judge
from mmalign.sections import EvaluateImages, Recipe

Say = Callable[[str], None]


def compare_images(
    recipe: Recipe, policy: Policy, judge: Judge | None, folder: Path, of: Mapping[str, Any], say: Say
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Draw with base and trained model from the same noise, measure by the exact reader or a judge, write to `folder`.

    Args:
        recipe: whose `evaluate` section says what is drawn, and how.
        policy: the trained model, with its base as reference.
        judge: for benchmark preference.
        folder: where to write the pictures, and the page's samples.
        of: what this evaluation is of.
        say: takes a line of text.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateImages)
    prompts = prompts_of("evaluate.prompts", section.prompts, section.split, section.seed)
    cut = policy.family.count_cut(prompts)
    if cut:
        say(f"{cut} of {len(prompts)} prompts are longer than the text encoder reads, and are cut")
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    before, after = draw_both(policy, prompts, seeds, assemble.sampling(section.drawing))
    told: list[list[dict[str, Any]]]  # of each side, what is known of each picture
    if section.benchmark == "scenes":
        truths = scenes.score_scenes(before, prompts), scenes.score_scenes(after, prompts)
        told = [[_told(truth) for truth in side] for side in truths]
        compared = scenes.compare_scenes(*truths, prompts)
        result, table, name = compared.as_dict(), compared.table(), "share of the prompt's parts that are right"
    else:
        assert section.judge is not None and judge is not None
        scores = [judge(images, prompts).tolist() for images in (before, after)]
        told = [[{"score": score, "note": ""} for score in side] for side in scores]
        judged = preference.compare_scores(scores[0], scores[1], prompts)
        result, table, name = judged.as_dict(), judged.table(), f"score of {section.judge.path}"
    for side, images in zip(SIDES, (before, after), strict=True):
        (folder / side).mkdir()
        for i, image in enumerate(images):
            image.save(folder / side / f"{i:05d}.png")
    samples = [
        {"prompt": prompt, "seed": seed, **dict(zip(SIDES, both, strict=True))}
        for prompt, seed, *both in zip(prompts, seeds, *told, strict=True)
    ]
    content = {"of": of, "score": name, "table": table, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {"benchmark": section.benchmark, "model": recipe.model.path, "method": recipe.method.name, **result}, table


def _told(truth: Truth) -> dict[str, Any]:
    return {"score": sum(truth.values()) / len(truth), "note": scenes.describe(truth), "right": truth["correct"]}


def count_images(samples: Sequence[Mapping[str, Any]]) -> tuple[Counts, Counts]:
    """The overall number of an evaluation's samples, before and after, to compare several runs by.

    It is the share of prompts that are drawn right, or of a judge's scores the win rate over the base model (a tie is
    half a win) and the mean.
    """
    keys = tuple((sample["prompt"], sample["seed"]) for sample in samples)
    groups = tuple(sample["prompt"] for sample in samples)
    columns: dict[str, Any]
    sides = []
    for side in SIDES:
        columns = {"images": np.ones(len(samples))}
        if all("right" in sample[side] for sample in samples):
            columns["right"] = np.array([sample[side]["right"] for sample in samples], dtype=np.float64)
            shares = {"prompts drawn right": lambda sums: ratio(sums["right"], sums["images"])}
            sides.append(Counts("scenes", keys, groups, columns, shares))
        else:
            scores, base = (np.array([sample[s]["score"] for sample in samples]) for s in (side, "before"))
            columns |= {"wins": 0.5 + 0.5 * np.sign(scores - base), "mean score": scores}
            shares = {"win rate": lambda sums: ratio(sums["wins"], sums["images"])}
            sides.append(Counts("preference", keys, groups, columns, shares, ("mean score",)))
    return sides[0], sides[1]


def entries(folder: Path, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Entry]:
    """Samples of the evaluation in a folder, by their numbers, with their pictures, as the page takes them."""
    found = []
    for i, sample in samples:
        before, after = (Image.open(folder / side / f"{i:05d}.png").convert("RGB") for side in SIDES)
        scores, notes = ([sample[side][key] for side in SIDES] for key in ("score", "note"))
        found.append(Entry(sample["prompt"], sample["seed"], before, after, *scores, *notes))
    return found


def draw_both(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the reference and of the policy, row by row from the same starting noise."""

    def run(net: nn.Module) -> list[Image.Image]:
        return draw(policy.family, net.eval(), prompts, seeds, sampling)

    before = policy.on_reference(run)
    assert before is not None
    return before, run(policy.unwrapped)


def draw(
    family: TextToImage, net: nn.Module, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> list[Image.Image]:
    """One picture for every prompt and seed, with a progress bar."""
    images: list[Image.Image] = []
    for i in tracked(range(0, len(prompts), sampling.batch_size), "draw"):
        rows = slice(i, i + sampling.batch_size)
        images += family.sample(net, prompts[rows], seeds[rows], sampling)
    return images


def prompts_of(key: str, which: int | str, split: Any, seed: int) -> list[str]:
    """That many prompts of the bundled world, or those of the file that the recipe names at `key`."""
    if isinstance(which, str):
        return assemble.read_prompts(key, which)
    from mmalign.data.scenes import sample_prompts

    return [str(p) for p in sample_prompts(split, which, seed)]


def couples_of(key: str, which: int | str, seed: int) -> list[tuple[str, str]]:
    """That many couples of contrasting training prompts of the bundled world, or those of the file named at `key`."""
    if isinstance(which, str):
        return assemble.read_couples(key, which)
    from mmalign.data.scenes import sample_contrasts

    return [(str(first), str(second)) for first, second in sample_contrasts(which, seed)]
