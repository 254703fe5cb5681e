"""Compare text-to-image models by what they draw: from a recipe's section to numbers, files, and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mmalign import assemble
from mmalign.data.scenes import ATTRIBUTES, Truth
from mmalign.drawings import Album, depends, draw
from mmalign.evaluation import diversity, preference, scenes
from mmalign.evaluation.counts import SIDES, Counts, Share, Sums, Values, compare, ratio
from mmalign.families import Sampling
from mmalign.page.pictures import Entry
from mmalign.policy import Policy
from mmalign.rewards import Judge
from mmalign.sections import EvaluateImages, Recipe

Say = Callable[[str], None]
Table = list[tuple[str, ...]]


def compare_images(
    recipe: Recipe, policy: Policy, judge: Judge | None, folder: Path, of: Mapping[str, Any], say: Say
) -> tuple[dict[str, Any], Table]:
    """Draw with base and trained model from the same noise, measure by the exact reader or a judge, write to `folder`.

    Args:
        recipe: whose `evaluate` section says what is drawn, and how.
        policy: the trained model, with its base as reference.
        judge: who says which picture is better; benchmark scenes does without as well.
        folder: where to write the pictures, and the page's samples.
        of: what this evaluation is of.
        say: takes a line of text.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateImages)
    prompts, seeds = _rows(section)
    cut = policy.family.count_cut(prompts)
    if cut:
        say(f"{cut} of {len(prompts)} prompts are longer than the text encoder reads, and are cut")
    albums = _albums(recipe, section, policy, of)
    drawn = draw_both(policy, prompts, seeds, assemble.sampling(section.drawing), albums)
    told, result, table, name = _measured(section, judge, drawn, prompts)
    samples = [
        {"prompt": prompt, "seed": seed, **dict(zip(SIDES, both, strict=True))}
        for prompt, seed, *both in zip(prompts, seeds, *told, strict=True)
    ]
    result, table = _with_more(section, samples, result, table)
    for folder_of, images in zip((folder / side for side in SIDES), drawn, strict=True):
        folder_of.mkdir()
        for i, image in enumerate(images):
            image.save(folder_of / f"{i:05d}.png")
    content = {"of": of, "score": name, "table": table, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {"benchmark": section.benchmark, "model": recipe.model.path, "method": recipe.method.name, **result}, table


def _rows(section: EvaluateImages) -> tuple[list[str], list[int]]:
    """The prompt and the seed of every picture; those of one prompt stand together."""
    once = prompts_of("evaluate.prompts", section.prompts, section.split, section.seed)
    prompts = [prompt for prompt in once for _ in range(section.per_prompt)]
    return prompts, [section.seed * 1_000_003 + i for i in range(len(prompts))]


def _measured(
    section: EvaluateImages, judge: Judge | None, drawn: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
) -> tuple[list[list[dict[str, Any]]], dict[str, Any], Table, str]:
    """What is known of each side's pictures; the benchmark's result and table; and what a picture's score is."""
    told: list[list[dict[str, Any]]] = [[{} for _ in prompts] for _ in SIDES]
    judged = [judge(images, prompts).tolist() for images in drawn] if judge is not None else []
    for side, scores in zip(told, judged, strict=False):
        _tell(side, judged=scores, score=scores, note=[""] * len(prompts))
    if section.per_prompt > 1:
        for side, images in zip(told, drawn, strict=True):
            _tell(side, apart=diversity.apart(images, prompts))
    if section.benchmark != "scenes":
        assert section.judge is not None, "benchmark preference has a judge"
        preferred = preference.compare_scores(judged[0], judged[1], prompts)
        return told, preferred.as_dict(), preferred.table(), f"score of {section.judge.path}"
    before, after = (scenes.score_scenes(images, prompts) for images in drawn)
    for side, truths in zip(told, (before, after), strict=True):
        right = [sum(truth.values()) / len(truth) for truth in truths]
        _tell(side, score=right, note=[scenes.describe(truth) for truth in truths], parts=truths)
    compared = scenes.compare_scenes(before, after, prompts)
    return told, compared.as_dict(), compared.table(), "share of the prompt's parts that are right"


def _tell(side: Sequence[dict[str, Any]], **columns: Sequence[Any]) -> None:
    """Add to what is known of a side's pictures."""
    for name, values in columns.items():
        for one, value in zip(side, values, strict=True):
            one[name] = value


def _with_more(
    section: EvaluateImages, samples: Sequence[Mapping[str, Any]], result: dict[str, Any], table: Table
) -> tuple[dict[str, Any], Table]:
    """The benchmark's own result and table, and what else was measured of the same pictures."""
    rows: Table = []
    for before, after in zip(*count_images(samples), strict=True):
        if before.benchmark == section.benchmark:
            continue
        compared = compare(before, after)
        result = {**result, before.benchmark: compared.as_dict()}
        rows += [(name, str(len(samples)), *shown) for name, *shown in compared.table()[1:]]
    if rows and section.benchmark != "scenes":  # whose table has these columns already
        table = [*table, ("", "images", "before", "after", "change [95 % interval]")]
    return result, [*table, *rows]


def count_images(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Counts], list[Counts]]:
    """What was measured of an evaluation's samples, before and after, to compare several runs by.

    Of the bundled world the share of prompts that are drawn right, and of each attribute where it is named; of a judge
    the win rate over the base model (a tie is half a win) and the mean score; and how different the pictures of a
    prompt are.
    """
    rows = _Rows(
        tuple((sample["prompt"], sample["seed"]) for sample in samples), tuple(sample["prompt"] for sample in samples)
    )
    base, sides = [sample["before"] for sample in samples], list[list[Counts]]()
    for side in ([sample[side] for sample in samples] for side in SIDES):
        sides.append([])
        if "parts" in side[0]:
            sides[-1].append(_count_scenes(rows, [one["parts"] for one in side]))
        if "judged" in side[0]:
            scores, before = (np.array([one["judged"] for one in some]) for some in (side, base))
            sides[-1].append(_count_scores(rows, scores, before))
        if "apart" in side[0]:
            columns = {"images": np.ones(len(side)), "apart": np.array([one["apart"] for one in side])}
            sides[-1].append(Counts("diversity", *rows, columns, {"diversity": partial(_share, "apart", "images")}))
    return sides[0], sides[1]


class _Rows(NamedTuple):
    """What tells samples apart, and which of them are of one prompt."""

    keys: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]


def _count_scenes(rows: _Rows, truths: Sequence[Truth]) -> Counts:
    columns = {"images": np.ones(len(truths)), "right": np.array([float(truth["correct"]) for truth in truths])}
    shares: dict[str, Share] = {"prompts drawn right": partial(_share, "right", "images")}
    for name in (name for name in ATTRIBUTES if any(name in truth for truth in truths)):
        columns[f"{name} named"] = np.array([float(name in truth) for truth in truths])
        columns[f"{name} right"] = np.array([float(truth.get(name, False)) for truth in truths])
        shares[name] = partial(_share, f"{name} right", f"{name} named")
    return Counts("scenes", *rows, columns, shares)


def _count_scores(rows: _Rows, scores: NDArray[np.float64], base: NDArray[np.float64]) -> Counts:
    wins = 0.5 + 0.5 * np.sign(scores - base)
    columns = {"images": np.ones(len(scores)), "wins": wins, "mean score": scores}
    return Counts("preference", *rows, columns, {"win rate": partial(_share, "wins", "images")}, ("mean score",))


def _share(part: str, whole: str, sums: Sums) -> Values:
    return ratio(sums[part], sums[whole])


def entries(folder: Path, samples: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Entry]:
    """Samples of the evaluation in a folder, by their numbers, with their pictures, as the page takes them."""
    found = []
    for i, sample in samples:
        before, after = (Image.open(folder / side / f"{i:05d}.png").convert("RGB") for side in SIDES)
        scores, notes = ([sample[side][key] for side in SIDES] for key in ("score", "note"))
        found.append(Entry(sample["prompt"], sample["seed"], before, after, *scores, *notes))
    return found


def draw_both(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    albums: tuple[Album, Album],
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the reference and of the policy, row by row from the same starting noise, kept in their albums."""

    def run(net: nn.Module, album: Album) -> list[Image.Image]:
        return draw(policy.family, net.eval(), prompts, seeds, sampling, album)

    before = policy.on_reference(partial(run, album=albums[0]))
    assert before is not None
    return before, run(policy.unwrapped, albums[1])


def _albums(recipe: Recipe, section: EvaluateImages, policy: Policy, of: Mapping[str, Any]) -> tuple[Album, Album]:
    """Where the pictures of the base and of the trained model are kept."""
    folder = Path(recipe.output) / "drawings" if section.cache == "auto" else Path(section.cache)
    assemble.make_folder("evaluate.cache", folder)
    models = of["trained"]["identity"]["model"], assemble.fingerprint(policy.unwrapped)
    before, after = (Album(folder, {**depends(recipe, section.drawing), "model": model}) for model in models)
    return before, after


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
