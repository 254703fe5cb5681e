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
from mmalign.feed import Opened, open_data, open_feed
from mmalign.page import Entry, write_gallery
from mmalign.policy import Policy
from mmalign.rewards import Judge
from mmalign.sections import Recipe
from mmalign.training import Trained, read_trained, require_base, train, unwritten, written

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
    drawn, trained = section.benchmark != "implicit", Path(recipe.output) / "model"
    if not drawn and not recipe.data.hold_out:
        raise ValueError("evaluate: implicit needs pairs kept from training; set data.hold_out, for example to 0.1")
    assemble.require_images(recipe, "evaluate")
    assemble.check(recipe, data=not drawn)
    about = read_trained(trained)
    opened = None if drawn else open_data(recipe.data, recipe.train.seed)
    device = _device()
    # Before hours of drawing: a judge that cannot be loaded.
    judge = assemble.judge(section.judge, device) if section.judge and section.benchmark == "preference" else None
    family = assemble.load_model(recipe.model, recipe.train.precision, device)
    require_base(about, trained, family)
    policy = assemble.load_aligned(family, trained)
    folder = Path(recipe.output) / "evaluation"
    with written(folder) as part:
        part.mkdir()
        if opened is None:
            result, table = _drawn(recipe, policy, judge, part, _of(recipe, about), say)
        else:
            result, table = _implicit(recipe, policy, opened, say)
        _write_json(part / "result.json", result)
    for row in table:
        say("  ".join(cell.ljust(22) for cell in row).rstrip())
    return Evaluation(folder, result, table)


def _of(recipe: Recipe, about: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation is of: another model or other settings want another one."""
    assert recipe.evaluate is not None
    return {"trained": dict(about), "evaluate": recipe.evaluate.model_dump()}


def _implicit(recipe: Recipe, policy: Policy, opened: Opened, say: Say) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """How often the trained model finds the chosen one of a held-out pair likelier than the base model does."""
    from accelerate import Accelerator

    assert recipe.evaluate is not None
    feed = open_feed(
        policy.family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accelerator=Accelerator(),
        say=say,
        opened=opened,
    )
    report = implicit.accuracy(policy, feed.held_out(), draws=recipe.evaluate.draws, seed=recipe.evaluate.seed)
    return report.as_dict(), report.table()


def _drawn(
    recipe: Recipe, policy: Policy, judge: Judge | None, folder: Path, of: Mapping[str, Any], say: Say
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Pictures of both models for the same prompts and starting noise, measured by the exact reader or by a judge."""
    section = recipe.evaluate
    assert section is not None
    prompts = _prompts("evaluate.prompts", section.prompts, section.split, section.seed)
    cut = policy.family.count_cut(prompts)
    if cut:
        say(f"{cut} of {len(prompts)} prompts are longer than the text encoder reads, and are cut")
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    before, after = draw_both(policy, prompts, seeds, assemble.sampling(section.drawing))
    if section.benchmark == "scenes":
        truths = scenes.score_scenes(before, prompts), scenes.score_scenes(after, prompts)
        comparison = scenes.compare_scenes(*truths, prompts)
        scored = [[sum(t.values()) / len(t) for t in side] for side in truths]
        notes = [[scenes.describe(t) for t in side] for side in truths]
        result, table, name = comparison.as_dict(), comparison.table(), "share of the prompt's parts that are right"
    else:
        assert section.judge is not None and judge is not None
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
    _write_json(folder / "samples.json", {"of": of, "score": name, "table": table, "samples": samples})
    return result, table


def gallery(recipe: Recipe, say: Say = print) -> Path:
    """Write the before-and-after page of the evaluation, made first if there is none, to `gallery/`.

    Where there are more samples than `gallery.images`, half of the page is the best gains and half the worst
    regressions.
    """
    if recipe.evaluate is None or recipe.evaluate.benchmark == "implicit":
        came = "benchmark implicit draws no pictures" if recipe.evaluate else "the recipe has no such section"
        raise ValueError(
            f"evaluate: {came}; a gallery shows those of benchmark scenes or preference, for example "
            "{benchmark: scenes, prompts: 256}"
        )
    file = Path(recipe.output) / "evaluation" / "samples.json"
    wanted = json.loads(json.dumps(_of(recipe, read_trained(Path(recipe.output) / "model"))))
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("of") != wanted:
        evaluate(recipe, say)
    content, folder = json.loads(file.read_text(encoding="utf-8")), file.parent
    samples = content["samples"]
    order = sorted(range(len(samples)), key=lambda i: samples[i]["before"] - samples[i]["after"])
    if len(order) > recipe.gallery.images:
        best = (recipe.gallery.images + 1) // 2
        order = order[:best] + order[len(order) - (recipe.gallery.images - best) :]
    entries = [_entry(folder, i, samples[i]) for i in order]
    target = Path(recipe.output) / "gallery"
    try:
        page = write_gallery(
            target,
            entries,
            title=recipe.gallery.title,
            summary=content["table"],
            score_name=content["score"],
            provenance=_provenance(recipe, len(samples)),
        )
    except OSError as error:
        raise unwritten(target, error) from error
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
    from rich.console import Console
    from rich.progress import track

    images: list[Image.Image] = []
    starts = range(0, len(prompts), sampling.batch_size)
    console = Console(stderr=True)
    quiet = len(starts) < 2 or not console.is_terminal
    for i in track(starts, description="draw", transient=True, console=console, disable=quiet):
        rows = slice(i, i + sampling.batch_size)
        images += family.sample(net, prompts[rows], seeds[rows], sampling)
    return images


def prepare(recipe: Recipe, say: Say = print) -> Path:
    """Draw images from the recipe's model, let the judge compare them, and write the pairs to `data.path`.

    A pair is the best and the worst image of one prompt, kept where the judge's preference probability (the logistic
    function of the difference of its scores) reaches `prepare.sure`. The file has the layout of Pick-a-Pic v2.

    Raises:
        ValueError: no `prepare` section, a file that is there already, or no pair that the judge is sure of.
    """
    from mmalign.data.drawn import write_pairs

    section = recipe.prepare
    if section is None:
        raise ValueError(
            "prepare: the recipe has no such section; "
            "add one with a judge, as configs/text_to_image/quickstart.yaml does"
        )
    assemble.require_images(recipe, "prepare")
    assemble.check(recipe, data=False)
    path = Path(recipe.data.path)
    if path.is_dir():
        raise ValueError(f"data.path: {path} is a folder; expected the name of the parquet file that prepare writes")
    if path.exists():
        raise ValueError(
            f"data.path: {path} is there already; move it away, or name another with --set data.path=...: "
            "prepare replaces nothing"
        )
    assemble.make_folder("data.path", path.parent)
    device, started = _device(), time.time()
    family = assemble.load_model(recipe.model, recipe.train.precision, device)
    judge = assemble.judge(section.judge, device)
    prompts = [
        p for p in _prompts("prepare.prompts", section.prompts, "train", section.seed) for _ in range(section.images)
    ]
    seeds = [section.seed * 1_000_003 + i for i in range(len(prompts))]
    images = draw(family, family.network, prompts, seeds, assemble.sampling(section.drawing))
    scores = judge(images, prompts).tolist()
    kept, asked = write_pairs(path, prompts, images, scores, group=section.images, sure=section.sure)
    say(f"{path}: {kept} pairs of {asked} prompts, from {len(images)} images in {time.time() - started:.0f} s")
    return path


def _prompts(key: str, which: int | str, split: Any, seed: int) -> list[str]:
    """That many prompts of the bundled world, or those of the file that the recipe names at `key`."""
    if isinstance(which, str):
        return assemble.read_prompts(key, which)
    from mmalign.data.scenes import sample_prompts

    return [str(p) for p in sample_prompts(split, which, seed)]


def list_everything(console: Any) -> None:
    """Print the methods, families, judges and shipped recipes that there are."""
    from mmalign import families, rewards
    from mmalign.share import roots

    console.print("methods:  " + ", ".join(methods.names()))
    pipelines = ", ".join(f"{file} ({cls})" for cls, file in families.PIPELINES.items())
    console.print(f"families: {pipelines}, vision_language (AutoModelForImageTextToText)")
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
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
