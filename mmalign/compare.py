"""Compare recipes: each trained with several seeds from the same base, measured on the same questions, in one table.

Every run is a folder of its own, trained and evaluated by the recipe as it is but for seed and output. What is there
already is not made again: the same command goes on where it was stopped, and one more recipe costs its own runs.

Recipes end where their `train.steps` say, which may be after as much time for each. With `pairs` every run is measured
after so many pairs as well, the same for all; a shorter run is the beginning of the longer one, which goes on from its
last checkpoint.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmalign import assemble, checkpoint, run
from mmalign.evaluate_images import measure_samples
from mmalign.evaluate_responses import measure_written
from mmalign.evaluation.counts import Metrics, summarize_runs
from mmalign.output import read_trained, written
from mmalign.page.comparison import RatedImage, TableRow, as_markdown, draw_curve, draw_side_by_side, short_names
from mmalign.page.grid import encode_grid
from mmalign.recipe import load_recipe
from mmalign.sections import EvaluateImages, EvaluateResponses, Recipe
from mmalign.share import locate

Say = Callable[[str], None]
SHOWN = 8  # prompts whose pictures stand side by side


class Stage(NamedTuple):
    """A recipe's runs of one length, a recipe for each seed.

    Attributes:
        name: the recipe's.
        at: the numbers of pairs asked for that this is; None among them if it is the recipe's own end.
        runs: the recipes, with their own folders.
    """

    name: str
    at: list[int | None]
    runs: list[Recipe]


def compare(
    sources: Sequence[str],
    *,
    seeds: int,
    output: Path,
    pairs: Sequence[int] = (),
    overrides: Sequence[str] = (),
    table: Path | None = None,
    say: Say = print,
) -> list[TableRow]:
    """Train every recipe with seeds 0, 1, ..., evaluate each run, and write what came of it.

    `comparison.md` and `comparison.json` have the numbers, `comparison.png` their curve over the seconds of training,
    and where pictures are drawn `comparison-pictures.png` has some of the first seed's.

    Pairs that a recipe prepares itself are prepared first, where they are not there yet, and shared by its seeds.

    Args:
        sources: recipes, by path or by shipped name; all of one model and one benchmark.
        seeds: how many runs of each.
        output: where everything is written.
        pairs: numbers of pairs after which every run is measured as well, also where its recipe ends before.
        overrides: settings of all recipes.
        table: where the table is written besides, as Markdown; what goes with it is put beside it, by its name.
        say: takes lines of text.

    Returns:
        The rows: the base model's, one for each recipe at its end, and one for each recipe at each number of pairs.

    Raises:
        ValueError: the recipes cannot be compared, or a run is there that was trained by another recipe.
    """
    recipes = _load(sources, overrides)
    plan = [
        stage
        for (name, recipe), source in zip(recipes.items(), sources, strict=True)
        for stage in _stages(name, recipe, source, seeds=seeds, output=output, pairs=pairs, overrides=overrides)
    ]
    for stage in plan:
        for one in stage.runs:
            _require_same(one)
    total, done = len(recipes) * seeds, 0
    for name in recipes:
        for seed in range(seeds):
            done += 1
            before: Recipe | None = None
            for stage in (stage for stage in plan if stage.name == name):
                one = stage.runs[seed]
                say(f"{name}, seed {seed}, {_pairs(one):,} pairs: run {done} of {total}")
                _finish(one, before, say)
                before = one
    rows = _rows(plan, [None, *sorted(set(pairs))])
    words = [word for number in pairs for word in ("--pairs", str(number))]
    words += [word for override in overrides for word in ("--set", override)]
    command = shlex.join(["mmalign", "compare", *sources, "--seeds", str(seeds), *words])
    for file in [output / "comparison.md", *([table] if table else [])]:
        _write(file, rows, plan, command)
        say(f"table: {file}")
    return rows


def _load(sources: Sequence[str], overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes by name, once it is known that they can be compared."""
    recipes: dict[str, Recipe] = {}
    for source in sources:
        name, recipe = Path(source).stem, load_recipe(source, overrides)
        if name in recipes:
            raise ValueError(f"compare: two recipes are called {name}; rename one, since its runs go by that name")
        section = recipe.evaluate
        if section is None or section.benchmark in ("implicit", "steps") or getattr(section, "answers", None):
            raise ValueError(
                f"compare: {source} says of no benchmark that asks or draws; add one, such as --set "
                "'evaluate={benchmark: crowds}'"
            )
        recipes[name] = recipe
    (first, one), *others = recipes.items()
    for name, other in others:
        for key in ("model.path", "model.revision", "evaluate"):
            mine, theirs = (_at(recipe, key) for recipe in (one, other))
            if mine != theirs:
                raise ValueError(
                    f"compare: {key} differs between {first} and {name} ({mine!r} and {theirs!r}); give both the same, "
                    f"for example by --set {key}=..."
                )
    return recipes


def _at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _stages(
    name: str,
    recipe: Recipe,
    source: str,
    *,
    seeds: int,
    output: Path,
    pairs: Sequence[int],
    overrides: Sequence[str],
) -> Iterator[Stage]:
    """The lengths of a recipe's runs, the shortest first."""
    batch, train = recipe.train.batch_size * recipe.train.accumulate, recipe.train
    if pairs and train.schedule != "constant":
        raise ValueError(
            f"compare: {name} has train.schedule {train.schedule}, which follows from train.steps, so that a "
            "shorter run is not the beginning of a longer one; leave --pairs out, or set train.schedule=constant"
        )
    steps: dict[int, list[int | None]] = {train.steps: [None]}
    for number in sorted(set(pairs)):
        if number < batch or number % batch:
            raise ValueError(
                f"compare: --pairs {number} is no whole number of updates of {name}, which takes {batch} pairs at a "
                "time; name a multiple of every recipe's train.batch_size times train.accumulate"
            )
        steps.setdefault(number // batch, []).append(number)
    for count, at in sorted(steps.items()):
        longer = "" if count == train.steps else f"-{count * batch}-pairs"
        runs = [
            _of_seed(source, [*overrides, f"train.steps={count}"], output / name / f"seed-{seed}{longer}", seed, output)
            for seed in range(seeds)
        ]
        yield Stage(name, at, runs)


def _of_seed(source: str, overrides: Sequence[str], folder: Path, seed: int, output: Path) -> Recipe:
    """The recipe of one run; what the frozen networks and the base model give is kept where all runs find it."""
    settings = [*overrides, f"output={json.dumps(str(folder))}", f"train.seed={seed}"]
    recipe = load_recipe(source, settings)
    if getattr(recipe.data, "cache", None) == "auto":
        settings.append(f"data.cache={json.dumps(str(output / 'cache'))}")
    if getattr(recipe.evaluate, "cache", None) == "auto":
        kept = "answers" if isinstance(recipe.evaluate, EvaluateResponses) else "drawings"
        settings.append(f"evaluate.cache={json.dumps(str(output / kept))}")
    return load_recipe(source, settings)


def _pairs(recipe: Recipe) -> int:
    """That it is trained on, with repetition."""
    return recipe.train.steps * recipe.train.batch_size * recipe.train.accumulate


def _require_same(recipe: Recipe) -> None:
    """That what is in a run's folder was trained by this very recipe."""
    file = Path(recipe.output) / "recipe.yaml"
    if not file.is_file():
        return
    was = load_recipe(file)
    for section in ("method", "model", "data", "train"):
        before, now = (getattr(one, section).model_dump(exclude={"cache"}) for one in (was, recipe))
        other = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
        if other is not None:
            raise ValueError(
                f"compare: {recipe.output} was trained with {section}.{other} {before.get(other)!r}, and now it is "
                f"{now.get(other)!r}; name another --output, or move that folder away"
            )


def _finish(recipe: Recipe, before: Recipe | None, say: Say) -> None:
    """Prepare, train and evaluate, whatever of it has not been done; `before` is the same run's shorter length."""
    if recipe.prepare is not None and not Path(locate(recipe.data.path)).exists():
        run.prepare(recipe, say)
    output = Path(recipe.output)
    model = output / "model"
    if not model.is_dir() or read_trained(model)["step"] != recipe.train.steps:
        if before is not None and checkpoint.latest(output) is None:
            _hand_on(Path(before.output), output)
        run.train(recipe, say)
    if not run.is_evaluated(recipe):
        run.evaluate(recipe, say)


def _hand_on(before: Path, output: Path) -> None:
    """Give a run's last checkpoint to go on from to the longer run; without one that begins anew, and does the same."""
    last = checkpoint.latest(before, resting=True)
    if last is not None:
        assemble.make_folder("compare", output)
        with written(output / last.name) as part:
            shutil.copytree(last, part)


def _counted(recipe: Recipe) -> tuple[list[Metrics], list[Metrics]]:
    """What was counted in an evaluated run, before and after."""
    folder = Path(recipe.output) / "evaluation"
    if isinstance(recipe.evaluate, EvaluateResponses):
        return measure_written(recipe.evaluate, folder)
    return measure_samples(_samples(recipe))


def _samples(recipe: Recipe) -> list[Mapping[str, Any]]:
    file = Path(recipe.output) / "evaluation" / "samples.json"
    samples: list[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["samples"]
    return samples


def _rows(plan: Sequence[Stage], places: Sequence[int | None]) -> list[TableRow]:
    """The base model's row, and one for each recipe at each place."""
    counted = [[_counted(one) for one in stage.runs] for stage in plan]
    base = counted[0][0][0]
    rows = [TableRow("base", "", None, 1, 0, 0.0, [(counts, summarize_runs(counts, [counts])) for counts in base])]
    for place in places:
        for stage, runs in zip(plan, counted, strict=True):
            if place not in stage.at:
                continue
            first, number = stage.runs[0], len(runs)
            seconds = [read_trained(Path(one.output) / "model")["seconds"] for one in stage.runs]
            each = zip(base, zip(*(after for _, after in runs), strict=True), strict=True)
            measured = [(counts, summarize_runs(counts, after)) for counts, after in each]
            mean = sum(seconds) / number
            rows.append(TableRow(stage.name, first.method.name, place, number, _pairs(first), mean, measured))
    return rows


# --------------------------------------------------------------------------------------------------------- what is left


def _write(file: Path, rows: Sequence[TableRow], plan: Sequence[Stage], command: str) -> None:
    """The table as Markdown, and beside it, by its name, the numbers, the curve and some pictures."""
    assemble.make_folder("compare", file.parent)
    with written(file) as part:
        part.write_text(as_markdown(rows, command), encoding="utf-8")
    with written(file.with_suffix(".json")) as part:
        part.write_text(json.dumps([row.as_dict() for row in rows], indent=1), encoding="utf-8")
    with written(file.with_suffix(".png")) as part:
        draw_curve(rows, part)
    if isinstance(plan[0].runs[0].evaluate, EvaluateImages):
        _write_pictures(file, {stage.name: stage.runs[0] for stage in plan if None in stage.at})


def _write_pictures(file: Path, ends: Mapping[str, Recipe]) -> None:
    """Write images of the first prompts, by the base model and by each recipe's first run, and their manifest."""
    samples = {name: _samples(recipe) for name, recipe in ends.items()}
    base, recipe = next(iter(samples.values())), next(iter(ends.values()))
    indices = list({sample["prompt"]: i for i, sample in reversed(list(enumerate(base)))}.values())[::-1][:SHOWN]
    columns = {"base": [_rated_image(Path(recipe.output), base[i], i, "before") for i in indices]}
    for name, short_name in short_names(list(samples)).items():
        output = Path(ends[name].output)
        columns[short_name] = [_rated_image(output, samples[name][i], i, "after") for i in indices]
    below = "its score by the judge. The frame is green where it is above the base model's."
    if any(sample["before"]["note"] for sample in base):
        below = "what is wrong with it. The frame is green where nothing is."
    lines = [
        "The first prompts of the evaluation, none chosen; a row's pictures begin with the same noise (seed 0).",
        f"Below a picture: {below}",
    ]
    prompts, title = [base[i]["prompt"] for i in indices], recipe.model.path
    manifest = {
        "picture": {"lines": [title, *lines]},
        "prompts": prompts,
        "notes": {name: [image.note for image in images] for name, images in columns.items()},
    }
    with written(file.with_name(f"{file.stem}-pictures.png")) as part:
        part.write_bytes(encode_grid(draw_side_by_side(prompts, columns, title, lines), [title, *lines]))
    with written(file.with_name(f"{file.stem}-pictures.json")) as part:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def _rated_image(output: Path, sample: Mapping[str, Any], index: int, side: str) -> RatedImage:
    with Image.open(output / "evaluation" / side / f"{index:05d}.png") as image:
        picture = image.convert("RGB")
    record = sample[side]
    if record["note"]:
        return RatedImage(picture, record["note"], record["note"] == "correct")
    return RatedImage(picture, f"{record['score']:.3g}", record["score"] > sample["before"]["score"])
