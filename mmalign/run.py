"""What a recipe can do: train, evaluate, show, and prepare its own pairs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmalign import assemble, methods
from mmalign.evaluation import implicit, preference, scenes
from mmalign.families import Sampling, TextToImage
from mmalign.feed import open_feed
from mmalign.page import Entry, write_gallery
from mmalign.policy import Policy
from mmalign.recipe import Recipe
from mmalign.share import resolve
from mmalign.training import Trained, train

__all__ = ["Evaluation", "Trained", "evaluate", "gallery", "prepare", "train"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        folder: where `result.json`, `samples.json` and the pictures are.
        result: the numbers, as in `result.json`.
        table: rows of text, the header first.
    """

    folder: Path
    result: dict[str, Any]
    table: list[tuple[str, ...]]


def evaluate(recipe: Recipe, say: Say = print) -> Evaluation:
    """Compare the base model with the trained one by the recipe's benchmark, and write `evaluation/` in its output.

    Raises:
        ValueError: the recipe has no `evaluate` section, or nothing has been trained yet.
    """
    section = recipe.evaluate
    if section is None:
        raise ValueError(
            "evaluate: the recipe has no such section; add one, for example {benchmark: scenes, prompts: 256}"
        )
    assemble.check(recipe, data=section.benchmark == "implicit")
    device = _device()
    family = assemble.load_model(recipe.model, recipe.train.precision, device)
    policy = assemble.load_aligned(family, Path(recipe.output) / "model")
    folder = Path(recipe.output) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    if section.benchmark == "implicit":
        evaluation = _implicit(recipe, policy, folder, say)
    else:
        evaluation = _drawn(recipe, policy, folder, device)
    _write_json(folder / "result.json", evaluation.result)
    for row in evaluation.table:
        say("  ".join(cell.ljust(22) for cell in row).rstrip())
    return evaluation


def _implicit(recipe: Recipe, policy: Policy, folder: Path, say: Say) -> Evaluation:
    """How often the trained model finds the chosen one of a held-out pair likelier than the base model does."""
    from accelerate import Accelerator

    assert recipe.evaluate is not None
    if not recipe.data.hold_out:
        raise ValueError("evaluate: implicit needs pairs kept from training; set data.hold_out, for example to 0.1")
    feed = open_feed(
        policy.family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accelerator=Accelerator(),
        say=say,
    )
    report = implicit.accuracy(policy, feed.held_out(), draws=recipe.evaluate.draws, seed=recipe.evaluate.seed)
    return Evaluation(folder, report.as_dict(), report.table())


def _drawn(recipe: Recipe, policy: Policy, folder: Path, device: torch.device) -> Evaluation:
    """Pictures of both models for the same prompts and starting noise, measured by the exact reader or by a judge."""
    section = recipe.evaluate
    assert section is not None
    prompts = _prompts(section.prompts, section.split, section.seed)
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    before, after = draw_both(policy, prompts, seeds, assemble.sampling(section.drawing))
    if section.benchmark == "scenes":
        truths = scenes.score_scenes(before, prompts), scenes.score_scenes(after, prompts)
        comparison = scenes.compare_scenes(*truths, prompts)
        scored = [[sum(t.values()) / len(t) for t in side] for side in truths]
        notes = [[scenes.describe(t) for t in side] for side in truths]
        result, table, name = comparison.as_dict(), comparison.table(), "share of the prompt's parts that are right"
    else:
        assert section.judge is not None
        judge = assemble.judge(section.judge, device)
        scored = [judge(images, prompts).tolist() for images in (before, after)]
        compared = preference.compare_scores(scored[0], scored[1], prompts)
        notes = [[""] * len(prompts)] * 2
        result, table, name = compared.as_dict(), compared.table(), f"score of {section.judge.path}"
    samples = []
    for i, prompt in enumerate(prompts):
        for side, images in (("before", before), ("after", after)):
            (folder / side).mkdir(exist_ok=True)
            images[i].save(folder / side / f"{i:05d}.png")
        samples.append(
            {
                "prompt": prompt,
                "seed": seeds[i],
                "before": scored[0][i],
                "after": scored[1][i],
                "notes": [n[i] for n in notes],
            }
        )
    result = {"benchmark": section.benchmark, "model": recipe.model.path, "method": recipe.method.name, **result}
    _write_json(folder / "samples.json", {"score": name, "table": table, "samples": samples})
    return Evaluation(folder, result, table)


def gallery(recipe: Recipe, say: Say = print) -> Path:
    """Write the before-and-after page of the evaluation, made first if there is none, to `gallery/`.

    Where there are more samples than `gallery.images`, half of the page is the best gains and half the worst
    regressions.
    """
    folder = Path(recipe.output) / "evaluation"
    if not (folder / "samples.json").is_file():
        evaluate(recipe, say)
    if not (folder / "samples.json").is_file():
        raise ValueError("gallery: benchmark implicit draws no pictures; use evaluate.benchmark scenes or preference")
    content = json.loads((folder / "samples.json").read_text())
    samples = content["samples"]
    order = sorted(range(len(samples)), key=lambda i: samples[i]["before"] - samples[i]["after"])
    if len(order) > recipe.gallery.images:
        best = (recipe.gallery.images + 1) // 2
        order = order[:best] + order[len(order) - (recipe.gallery.images - best) :]
    entries = [_entry(folder, i, samples[i]) for i in order]
    page = write_gallery(
        Path(recipe.output) / "gallery",
        entries,
        title=recipe.gallery.title,
        summary=content["table"],
        score_name=content["score"],
        provenance=_provenance(recipe, len(samples)),
    )
    say(f"gallery: {page}")
    return page


def _entry(folder: Path, i: int, sample: Mapping[str, Any]) -> Entry:
    before, after = (Image.open(folder / side / f"{i:05d}.png").convert("RGB") for side in ("before", "after"))
    notes = sample["notes"]
    return Entry(sample["prompt"], sample["seed"], before, after, sample["before"], sample["after"], notes[0], notes[1])


def _provenance(recipe: Recipe, number: int) -> dict[str, str]:
    drawing = recipe.evaluate.drawing if recipe.evaluate else None
    sampler = f"{drawing.sampler}, {drawing.steps} steps, guidance {drawing.guidance:g}" if drawing else ""
    train = recipe.train
    pairs = train.batch_size * train.accumulate
    return {
        "model": recipe.model.path,
        "method": ", ".join(f"{k} {v}" for k, v in recipe.method.model_dump().items()),
        "training": f"{recipe.model.tune}, {train.steps} updates of {pairs} pairs, lr {train.lr:g}",
        "pairs": recipe.data.path,
        "sampler": sampler,
        "samples": f"{number} evaluated; both models start from the same noise",
    }


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
    from rich.progress import track

    images: list[Image.Image] = []
    starts = range(0, len(prompts), sampling.batch_size)
    for i in track(starts, description="draw", transient=True, disable=len(starts) < 2):
        rows = slice(i, i + sampling.batch_size)
        images += family.sample(net, prompts[rows], seeds[rows], sampling)
    return images


def prepare(recipe: Recipe, say: Say = print) -> Path:
    """Draw images from the recipe's model, let the judge compare them, and write the pairs to `data.path`.

    A pair is the best and the worst image of one prompt, kept where the judge's preference probability (the logistic
    function of the difference of its scores) reaches `prepare.sure`. The file has the layout of Pick-a-Pic v2.

    Raises:
        ValueError: no `prepare` section, or no pair that the judge is sure of.
    """
    from mmalign.data.drawn import write_pairs

    section = recipe.prepare
    if section is None:
        raise ValueError(
            "prepare: the recipe has no such section; "
            "add one with a judge, as configs/text_to_image/quickstart.yaml does"
        )
    device, started = _device(), time.time()
    family = assemble.load_model(recipe.model, recipe.train.precision, device)
    judge = assemble.judge(section.judge, device)
    prompts = [p for p in _prompts(section.prompts, "train", section.seed) for _ in range(section.images)]
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    images = draw(family, family.denoiser, prompts, seeds, assemble.sampling(section.drawing))
    scores = judge(images, prompts).tolist()
    path = Path(recipe.data.path)
    kept, asked = write_pairs(path, prompts, images, scores, group=section.images, sure=section.sure)
    say(f"{path}: {kept} pairs of {asked} prompts, from {len(images)} images in {time.time() - started:.0f} s")
    return path


def _prompts(which: int | str, split: Any, seed: int) -> list[str]:
    """That many prompts of the bundled world, or the lines of a file.

    Raises:
        ValueError: the file has no prompt.
    """
    if isinstance(which, int):
        from mmalign.data.scenes import sample_prompts

        return [str(p) for p in sample_prompts(split, which, seed)]
    path = resolve(which)
    lines = [line.strip() for line in path.read_text().splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts: {path} has none; expected one prompt a line")
    return prompts


def list_everything(console: Any) -> None:
    """Print the methods, families, judges and shipped recipes that there are."""
    from mmalign import families, rewards
    from mmalign.share import roots

    console.print("methods:  " + ", ".join(methods.names()))
    console.print("families: " + ", ".join(f"{file} ({cls})" for cls, file in families.PIPELINES.items()))
    console.print("judges:   " + ", ".join(rewards.names()))
    console.print("recipes:")
    for root in roots():
        for path in sorted((root / "configs").rglob("*.yaml")):
            first = path.read_text().splitlines()[0].lstrip("# ")
            console.print(f"  {path.relative_to(root)}  {first}", markup=False)
        if (root / "configs").is_dir():
            return


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _write_json(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)
