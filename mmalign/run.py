"""What a recipe can do: train, evaluate, show, and prepare its own pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign import assemble, evaluate_images, evaluate_responses, methods
from mmalign.evaluation import implicit, steps
from mmalign.feed import Feed, Opened, open_data, open_feed
from mmalign.output import read_trained, require_base, unwritten, written
from mmalign.page import answers, pictures
from mmalign.page.files import write_page
from mmalign.page.ranking import spread
from mmalign.policy import Policy
from mmalign.rejected import Writer
from mmalign.sections import (
    Evaluate,
    EvaluateImages,
    EvaluateResponses,
    EvaluateSteps,
    ImageModel,
    JudgeModel,
    PrepareImages,
    PrepareResponses,
    Recipe,
)
from mmalign.training import Trained, train

__all__ = ["Evaluation", "Trained", "evaluate", "gallery", "prepare", "train"]

Say = Callable[[str], None]
Table = list[tuple[str, ...]]
Measure = Callable[[Path], tuple[dict[str, Any], Table]]  # to the folder that its files go to


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
    table: Table


def evaluate(recipe: Recipe, say: Say = print) -> Evaluation:
    """Compare the base model with the trained one by the recipe's benchmark, and write `evaluation/` in its output.

    Raises:
        ValueError: the recipe has no `evaluate` section, a file that it names is missing or bad, or nothing has been
            trained yet.
    """
    section = recipe.evaluate
    if section is None:
        raise ValueError(f"evaluate: the recipe has no such section; add one, for example {_example(recipe)}")
    of_pairs = section.benchmark in ("implicit", "steps")
    if of_pairs and not recipe.data.hold_out:
        needed = "needs pairs kept from training; set data.hold_out, for example to 0.1"
        raise ValueError(f"evaluate: {section.benchmark} {needed}")
    assemble.check(recipe, data=of_pairs)
    measure = _measure_files(section) or _measure_models(recipe, section, say)
    folder = assemble.make_folder("output", Path(recipe.output)) / "evaluation"
    with written(folder) as part:
        part.mkdir()
        result, table = measure(part)
        (part / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for row in table:
        say("  ".join(cell.ljust(22) for cell in row).rstrip())
    return Evaluation(folder, result, table)


def _example(recipe: Recipe) -> str:
    if isinstance(recipe.model, JudgeModel):
        return "{benchmark: steps}"
    pictures = isinstance(recipe.model, ImageModel)
    return "{benchmark: scenes, prompts: 256}" if pictures else "{benchmark: crowds, pictures: 256}"


def _measure_files(section: Evaluate) -> Measure | None:
    """The scores of the answers that a section names; None where it names none."""
    if not isinstance(section, EvaluateResponses) or section.answers is None:
        return None
    scored = evaluate_responses.score_files(section)
    return lambda _: scored


def _measure_models(recipe: Recipe, section: Evaluate, say: Say) -> Measure:
    """How to compare the models, once all that it takes is there: questions and judge before any model is loaded."""
    device, trained = _device(), Path(recipe.output) / "model"
    about = read_trained(trained)
    opened = benchmark = judge = None
    if section.benchmark in ("implicit", "steps"):
        opened = open_data(recipe.data, recipe.train.seed)
    elif isinstance(section, EvaluateResponses):
        benchmark = evaluate_responses.open_benchmark(section)
    elif isinstance(section, EvaluateImages) and section.judge:
        judge = assemble.judge(section.judge, device)
    family = assemble.load_model(recipe, device, say)
    require_base(about, trained, family)
    policy = assemble.load_aligned(family, trained)
    of = _of(section, about)
    if opened is not None:
        measured = _steps if isinstance(section, EvaluateSteps) else _implicit
        return lambda _: measured(recipe, section, policy, opened, say)
    if benchmark is not None:
        return lambda folder: evaluate_responses.compare_answers(recipe, policy, benchmark, folder, of, say)
    return lambda folder: evaluate_images.compare_images(recipe, policy, judge, folder, of, say)


def _of(section: Evaluate, about: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation is of: another model or other settings want another one."""
    return {"trained": dict(about), "evaluate": section.model_dump()}


def _implicit(
    recipe: Recipe, section: Evaluate, policy: Policy, opened: Opened, say: Say
) -> tuple[dict[str, Any], Table]:
    """How often the trained model finds the chosen side of a held-out pair likelier than the base model does."""
    feed = _feed(recipe, policy, opened, say)
    pictures = isinstance(section, EvaluateImages)
    score = (implicit.image_scores if pictures else implicit.response_scores)(policy.family)
    draws = section.draws if isinstance(section, EvaluateImages) else 1
    report = implicit.accuracy(policy, feed.held_out(), score, draws=draws, seed=section.seed)
    return report.as_dict(), report.table()


def _steps(recipe: Recipe, section: Evaluate, policy: Policy, opened: Opened, say: Say) -> tuple[dict[str, Any], Table]:
    """How often the trained judge, and the one that it began as, prefer the chosen image of a held-out pair."""
    assert isinstance(section, EvaluateSteps)
    batches = _feed(recipe, policy, opened, say, methods.find(recipe.method.name)).held_out()
    found = steps.accuracy(policy, batches, section.times, guidance=recipe.method.guidance, seed=section.seed)
    return found.as_dict(), found.table()


def _feed(recipe: Recipe, policy: Policy, opened: Opened, say: Say, method: Any = None) -> Feed:
    """The recipe's pairs, encoded, with what a method asks for besides."""
    from accelerate import Accelerator

    return open_feed(
        policy.family,
        recipe.data,
        output=Path(recipe.output),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accelerator=Accelerator(),
        say=say,
        method=method,
        opened=opened,
    )


def is_evaluated(recipe: Recipe) -> bool:
    """Whether the recipe's trained model has been evaluated as the recipe says.

    Raises:
        ValueError: nothing has been trained.
    """
    assert recipe.evaluate is not None
    file = Path(recipe.output) / "evaluation" / "samples.json"
    wanted = json.loads(json.dumps(_of(recipe.evaluate, read_trained(Path(recipe.output) / "model"))))
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("of") == wanted


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


def prepare(recipe: Recipe, say: Say = print, *, writer: Writer | None = None) -> Path:
    """Make the pairs that the recipe learns from, and write them to `data.path`.

    Args:
        recipe: with a section `prepare`: a text-to-image model draws images and a judge compares them; for a
            vision-language model true answers are made untrue (see `prepare_responses`).
        say: takes lines of text.
        writer: of responses, see there.

    Raises:
        ValueError: no `prepare` section, a file that is there already, or no pair.
    """
    from mmalign.prepare_images import prepare_images
    from mmalign.prepare_responses import prepare_responses

    if isinstance(recipe.model, JudgeModel):
        raise ValueError("prepare: a judge draws no pictures; use a recipe whose model does")
    if recipe.prepare is None:
        example = (
            "configs/text_to_image/quickstart.yaml has one with a judge"
            if isinstance(recipe.model, ImageModel)
            else "for example {kind: povid, source: {path: answers.jsonl}}"
        )
        raise ValueError(f"prepare: the recipe has no such section; add one: {example}")
    if isinstance(recipe.prepare, PrepareResponses):
        return prepare_responses(recipe, say, writer=writer)
    if writer is not None:
        raise ValueError("prepare: text-to-image models draw and judge images; they take no function for responses")
    assert isinstance(recipe.prepare, PrepareImages)
    return prepare_images(recipe, say)


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
