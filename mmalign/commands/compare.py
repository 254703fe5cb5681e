"""The command `compare`: train recipes with several seeds, evaluate them alike, and write one table.

All recipes start from the same base model and are evaluated on the same questions. Every run has its own folder, and
follows its recipe except for seed and output. Finished runs are reused: the same command resumes where it was stopped,
and one more recipe costs only its own runs.

A recipe ends at its `train.steps`, which may stand for equal time. With `pairs` every run is also evaluated after these
numbers of pairs. A shorter run is the beginning of the longer one, which resumes from its last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmalign import atomic_io
from mmalign.atomic_io import atomic_write, write_json
from mmalign.commands import evaluate, prepare, train
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.evaluation.best_of import describe_bound
from mmalign.evaluation.comparison import TableRow, add_differences
from mmalign.evaluation.metrics import Metrics, RunStatistics, summarize_runs
from mmalign.methods import requirements_of
from mmalign.modalities import Samples, modality_of
from mmalign.pages.comparison import as_markdown, plot_curve
from mmalign.resources import locate
from mmalign.training import checkpoint
from mmalign.training.export import read_run_info

logger = logging.getLogger(__name__)

BASELINES = ("sft", "response_sft")  # methods that learn from the chosen side alone
# Settings of a model that may differ between recipes: those of training, and precisions
OF_TRAINING = {"tune", "lora", "offload", "quantize", "vae_dtype"}


class Stage(NamedTuple):
    """Runs of a recipe with one length, one for each seed.

    Attributes:
        name: the recipe's name.
        lengths: the requested numbers of pairs that equal this length; None stands for the recipe's own end.
        runs: the recipes of the runs, with their own folders.
    """

    name: str
    lengths: list[int | None]
    runs: list[Recipe]


def compare(
    sources: Sequence[str],
    *,
    seeds: int = 3,
    output: Path = Path("runs/compare"),
    pairs: Sequence[int] = (),
    overrides: Sequence[str] = (),
    table: Path | None = None,
) -> list[TableRow]:
    """Train every recipe with seeds 0, 1, ..., evaluate each run, and write the results.

    Every method is compared with the base model, with the best baseline (fine-tuning) and with every other method,
    paired by question and seed. Each of these tables is corrected for its number of comparisons by Holm's method.
    With `evaluate.best_of` the base model's best of n images are rows too.

    `comparison.md` and `comparison.json` have the numbers, `comparison.png` their curve over the seconds of training.
    For image models `comparison-pictures.png` shows some images of the first seed, with a manifest beside it. If a
    recipe prepares its own pairs, missing ones are prepared first, and all its seeds share them.

    Args:
        sources: recipes, by path or by shipped name; all of one model and one benchmark.
        seeds: number of runs of each recipe.
        output: folder of all files.
        pairs: numbers of pairs after which every run is also evaluated, even beyond its recipe's end.
        overrides: settings of all recipes.
        table: path of a second copy of the table, as Markdown, with its JSON and image files.

    Returns:
        The rows: the base model's, one for each recipe at its end, and one for each recipe at each number of pairs.

    Raises:
        ValueError: the recipes cannot be compared, the table cannot be written, or a folder has another recipe's run.
    """
    atomic_io.prepare_file("--table", table)
    # All runs, checked before the first one starts
    recipes = _load(sources, overrides)
    plan = [
        stage
        for (name, recipe), source in zip(recipes.items(), sources, strict=True)
        for stage in _stages(name, recipe, source, seeds=seeds, output=output, pairs=pairs, overrides=overrides)
    ]
    for stage in plan:
        for run_recipe in stage.runs:
            _check_trained_by(run_recipe)

    _finish_all(plan, list(recipes), seeds)

    # Table, curve and images
    rows = _rows(plan, [None, *sorted(set(pairs))])
    options = [word for number in pairs for word in ("--pairs", str(number))]
    options += [word for override in overrides for word in ("--set", override)]
    command = shlex.join(["mmalign", "compare", *sources, "--seeds", str(seeds), *options])
    for file in [output / "comparison.md", *([table] if table else [])]:
        _write(file, rows, plan, command)
        logger.info(f"table: {file}")
    return rows


def _finish_all(plan: Sequence[Stage], names: Sequence[str], seeds: int) -> None:
    """Train and evaluate all runs, the shorter ones of each seed first."""
    for number, (name, seed) in enumerate(itertools.product(names, range(seeds)), start=1):
        shorter: Recipe | None = None
        for stage in (stage for stage in plan if stage.name == name):
            recipe = stage.runs[seed]
            logger.info(f"{name}, seed {seed}, {_num_pairs(recipe):,} pairs: run {number} of {len(names) * seeds}")
            _finish(recipe, shorter)
            shorter = recipe


def _load(sources: Sequence[str], overrides: Sequence[str]) -> dict[str, Recipe]:
    """Load the recipes by name, and check that they can be compared."""
    recipes: dict[str, Recipe] = {}
    for source in sources:
        name, recipe = Path(source).stem, load_recipe(source, overrides)
        if name in recipes:
            raise ValueError(
                f"compare: two recipes are called {name}; rename one, since each recipe's runs are stored by name"
            )
        # Runs are compared by their samples
        samples = modality_of(recipe).samples
        if recipe.evaluate is None or samples is None or samples.unavailable_reason(recipe) is not None:
            raise ValueError(
                f"compare: {source} has no benchmark with generated images or answers; add one, such as --set "
                "'evaluate={benchmark: crowds}'"
            )
        recipes[name] = recipe
    (first_name, first), *others = recipes.items()
    for name, other in others:
        settings = _base(other)
        for key, value in _base(first).items():
            if value != (another := settings.get(key)):
                raise ValueError(
                    f"compare: {key} differs between {first_name} and {name} ({value!r} and {another!r}); give both "
                    f"the same, for example by --set {key}=..."
                )
    return recipes


def _base(recipe: Recipe) -> dict[str, object]:
    """Return what decides the base model's row by key; it must be equal for all recipes."""
    model = recipe.model.model_dump(exclude=OF_TRAINING)
    return {**{f"model.{key}": value for key, value in model.items()}, "evaluate": recipe.evaluate}


def _samples_of(recipe: Recipe) -> Samples:
    samples = modality_of(recipe).samples
    assert samples is not None, "_load refuses recipes without samples"
    return samples


def _stages(
    name: str, recipe: Recipe, source: str, *, seeds: int, output: Path, pairs: Sequence[int], overrides: Sequence[str]
) -> Iterator[Stage]:
    """Yield the stages of a recipe's runs, the shortest first."""
    options = recipe.train
    batch_size = train.pairs_per_update(options, requirements_of(recipe.method))
    if pairs and options.schedule != "constant":
        raise ValueError(
            f"compare: {name} has train.schedule {options.schedule}, which follows from train.steps, so that a "
            "shorter run is not the beginning of a longer one; leave --pairs out, or set train.schedule=constant"
        )
    # Updates of each length, with the numbers of pairs that ask for it
    lengths: dict[int, list[int | None]] = {options.steps: [None]}
    for number in sorted(set(pairs)):
        if number < batch_size or number % batch_size:
            raise ValueError(
                f"compare: --pairs {number} is not a whole number of updates of {name}, which takes {batch_size} pairs "
                "at a time; name a multiple of what an update of every recipe takes"
            )
        lengths.setdefault(number // batch_size, []).append(number)
    for steps, numbers in sorted(lengths.items()):
        suffix = "" if steps == options.steps else f"-{steps * batch_size}-pairs"
        settings, folder = [*overrides, f"train.steps={steps}"], output / name
        runs = [_load_run(source, settings, folder / f"seed-{seed}{suffix}", seed, output) for seed in range(seeds)]
        yield Stage(name, numbers, runs)


def _load_run(source: str, overrides: Sequence[str], folder: Path, seed: int, output: Path) -> Recipe:
    """Load the recipe of one run; all runs share the caches of frozen networks and of base model outputs."""
    settings = [*overrides, f"output={json.dumps(str(folder))}", f"train.seed={seed}"]
    recipe = load_recipe(source, settings)
    # A cache in the run's own folder would be filled for every run
    if recipe.data.cache == "auto":
        settings.append(f"data.cache={json.dumps(str(output / 'cache'))}")
    if recipe.evaluate is not None and recipe.evaluate.model_dump().get("cache") == "auto":
        settings.append(f"evaluate.cache={json.dumps(str(output / _samples_of(recipe).outputs))}")
    return load_recipe(source, settings)


def _num_pairs(recipe: Recipe) -> int:
    """Return the number of pairs that a recipe trains on, with repetition."""
    return recipe.train.steps * train.pairs_per_update(recipe.train, requirements_of(recipe.method))


def _check_trained_by(recipe: Recipe) -> None:
    """Check that a run in the recipe's folder was trained by the same recipe."""
    file = Path(recipe.output) / "recipe.yaml"
    if not file.is_file():
        return
    trained_by = load_recipe(file)
    for section in ("method", "model", "data", "train"):
        before, now = (getattr(some, section).model_dump(exclude={"cache"}) for some in (trained_by, recipe))
        different = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
        if different is not None:
            raise ValueError(
                f"compare: {recipe.output} was trained with {section}.{different} {before.get(different)!r}, and now "
                f"it is {now.get(different)!r}; name another --output, or move that folder away"
            )


def _finish(recipe: Recipe, shorter: Recipe | None) -> None:
    """Prepare, train and evaluate, if not done; `shorter` is the same run at its previous length."""
    if recipe.prepare is not None and not Path(locate(recipe.data.path)).exists():
        prepare.prepare(recipe)
    output = Path(recipe.output)
    model = output / "model"
    # No model of this length yet: a shorter run of the same recipe is its beginning
    if not model.is_dir() or read_run_info(model).step != recipe.train.steps:
        if shorter is not None and checkpoint.latest(output) is None:
            _copy_checkpoint(Path(shorter.output), output)
        train.train(recipe)
    if not evaluate.is_evaluated(recipe):
        evaluate.evaluate(recipe)


def _copy_checkpoint(shorter: Path, output: Path) -> None:
    """Copy a run's last checkpoint to the longer run, which otherwise starts over with the same result."""
    last = checkpoint.latest(shorter, resumable=True)
    if last is not None:
        atomic_io.make_folder("compare", output)
        with atomic_write(output / last.name, marker="checkpoint.json") as part:
            shutil.copytree(last, part)


def _rows(plan: Sequence[Stage], lengths: Sequence[int | None]) -> list[TableRow]:
    """Return the base model's row, and one for each recipe at each length."""
    # By stage and run: metrics of base and trained model, one for each benchmark
    metrics = [[_samples_of(recipe).metrics(recipe) for recipe in stage.runs] for stage in plan]
    base, first_run = metrics[0][0][0], plan[0].runs[0]
    best_of_n = _samples_of(first_run).best_of(first_run)
    rows = [TableRow("base", "", None, 1, 0, 0.0, _summarize(base, [base]))]
    for length in lengths:
        of_length: list[TableRow] = []
        stages = [(stage, runs) for stage, runs in zip(plan, metrics, strict=True) if length in stage.lengths]
        for stage, runs in stages:
            first, number = stage.runs[0], len(runs)
            # Means over the seeds
            seconds = sum(read_run_info(Path(recipe.output) / "model").seconds for recipe in stage.runs) / number
            measured, pairs = _summarize(base, [after for _, after in runs]), _num_pairs(first)
            of_length.append(TableRow(stage.name, first.method.name, length, number, pairs, seconds, measured))
        # Every recipe of this length against the others, paired by seed
        trained = [[after for _, after in runs] for _, runs in stages]
        for n, best in best_of_n.items():  # chosen from the base model alone, so the same for every seed
            repeated = [best] * len(trained[0])
            measured = _summarize(base, repeated)
            of_length.append(TableRow(f"best of {n}", describe_bound(n), length, len(repeated), 0, 0.0, measured))
            trained.append(repeated)
        rows += add_differences(rows[0], of_length, trained, BASELINES)
    return rows


def _summarize(base: Sequence[Metrics], runs: Sequence[Sequence[Metrics]]) -> list[tuple[Metrics, RunStatistics]]:
    """Return the base model's metrics of each benchmark, with the statistics of the runs."""
    return [(before, summarize_runs(before, after)) for before, *after in zip(base, *runs, strict=True)]


# --------------------------------------------------------------------------------------------------------- output files


def _write(file: Path, rows: Sequence[TableRow], plan: Sequence[Stage], command: str) -> None:
    """Write the table as Markdown, and beside it the numbers, the curve and some images."""
    atomic_io.make_folder("compare", file.parent)
    with atomic_write(file) as part:
        part.write_text(as_markdown(rows, command), encoding="utf-8")
    write_json(file.with_suffix(".json"), [row.as_dict() for row in rows])
    with atomic_write(file.with_suffix(".png")) as part:
        plot_curve(rows, part)
    if (write_images := _samples_of(plan[0].runs[0]).write_images) is not None:
        write_images(file, {stage.name: stage.runs[0] for stage in plan if None in stage.lengths})
