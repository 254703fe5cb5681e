"""Compare recipes: each trained with several seeds from the same base, measured on the same questions, in one table.

Every run is a folder of its own, trained and evaluated by the recipe as it is but for seed and output. What is there
already is not made again: the same command goes on where it was stopped, and one more recipe costs its own runs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import assemble, run
from mmalign.evaluate_images import count_images
from mmalign.evaluate_responses import count_answers
from mmalign.evaluation.counts import Counts, Runs, over_runs
from mmalign.evaluation.intervals import Interval
from mmalign.output import read_trained, written
from mmalign.recipe import load_recipe
from mmalign.sections import EvaluateResponses, Recipe
from mmalign.share import locate

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What the runs of one recipe came to; the base model is a row with a single run.

    Attributes:
        name: the recipe's.
        method: that it trains by; nothing for the base model.
        runs: how many there are.
        pairs: that each of them was trained on, with repetition.
        measured: of each set of measures what was counted in the base model's answers, and the runs beside it.
    """

    name: str
    method: str
    runs: int
    pairs: int
    measured: list[tuple[Counts, Runs]]

    def cells(self, of: Callable[[Runs], Mapping[str, Interval]]) -> Iterator[tuple[str, bool, Interval]]:
        """The main measures: label, whether it is a share, and its interval."""
        for base, runs in self.measured:
            for name in base.in_short:
                yield base.label(name), name in base.shares, of(runs)[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every main measure with its runs, and its change from the base model."""
        values = [runs.values[name] for base, runs in self.measured for name in base.in_short]
        means, changes = (list(self.cells(of)) for of in (_means, _changes))
        return {
            "name": self.name,
            "method": self.method,
            "runs": self.runs,
            "pairs": self.pairs,
            "measures": {
                label: {**mean.as_dict(), "runs": list(each), "change": change.as_dict()}
                for (label, _, mean), (_, _, change), each in zip(means, changes, values, strict=True)
            },
        }


def compare(
    sources: Sequence[str],
    *,
    seeds: int,
    output: Path,
    overrides: Sequence[str] = (),
    table: Path | None = None,
    say: Say = print,
) -> list[Row]:
    """Train every recipe with seeds 0, 1, ..., evaluate each run, and write `comparison.md` and `comparison.json`.

    Pairs that a recipe prepares itself are prepared first, where they are not there yet, and shared by its seeds.

    Args:
        sources: recipes, by path or by shipped name; all of one model and one benchmark.
        seeds: how many runs of each.
        output: where everything is written.
        overrides: settings of all recipes.
        table: where the table is written besides, as Markdown; its numbers go beside it, as JSON.
        say: takes lines of text.

    Returns:
        The rows: the base model's, and one for each recipe.

    Raises:
        ValueError: the recipes cannot be compared, or a run is there that was trained by another recipe.
    """
    recipes = _load(sources, overrides)
    plan = {
        name: [_of_seed(source, overrides, output / name / f"seed-{seed}", seed, output) for seed in range(seeds)]
        for name, source in zip(recipes, sources, strict=True)
    }
    for planned in plan.values():
        for one in planned:
            _require_same(one)
    for number, (name, planned) in enumerate(plan.items()):
        for seed, one in enumerate(planned):
            say(f"{name}, seed {seed}: run {number * seeds + seed + 1} of {len(plan) * seeds}")
            _finish(one, say)
    rows = _rows(plan)
    settings = [word for override in overrides for word in ("--set", override)]
    command = shlex.join(["mmalign", "compare", *sources, "--seeds", str(seeds), *settings])
    for file in [output / "comparison.md", *([table] if table else [])]:
        _write(file, _markdown(rows, command), rows)
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


def _of_seed(source: str, overrides: Sequence[str], folder: Path, seed: int, output: Path) -> Recipe:
    """The recipe of one run; what the base model says or draws is kept where all runs find it."""
    settings = [*overrides, f"output={json.dumps(str(folder))}", f"train.seed={seed}"]
    recipe = load_recipe(source, settings)
    if getattr(recipe.evaluate, "cache", None) == "auto":
        kept = "answers" if isinstance(recipe.evaluate, EvaluateResponses) else "drawings"
        settings.append(f"evaluate.cache={json.dumps(str(output / kept))}")
        recipe = load_recipe(source, settings)
    return recipe


def _require_same(recipe: Recipe) -> None:
    """That what is in a run's folder was trained by this very recipe."""
    file = Path(recipe.output) / "recipe.yaml"
    if not file.is_file():
        return
    was = load_recipe(file)
    for section in ("method", "model", "data", "train"):
        before, now = (getattr(one, section).model_dump() for one in (was, recipe))
        other = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
        if other is not None:
            raise ValueError(
                f"compare: {recipe.output} was trained with {section}.{other} {before.get(other)!r}, and now it is "
                f"{now.get(other)!r}; name another --output, or move that folder away"
            )


def _finish(recipe: Recipe, say: Say) -> None:
    """Prepare, train and evaluate, whatever of it has not been done."""
    if recipe.prepare is not None and not Path(locate(recipe.data.path)).exists():
        run.prepare(recipe, say)
    model = Path(recipe.output) / "model"
    if not model.is_dir() or read_trained(model)["step"] != recipe.train.steps:
        run.train(recipe, say)
    if not run.is_evaluated(recipe):
        run.evaluate(recipe, say)


def _counted(recipe: Recipe) -> tuple[list[Counts], list[Counts]]:
    """What was counted in an evaluated run, before and after."""
    folder = Path(recipe.output) / "evaluation"
    if isinstance(recipe.evaluate, EvaluateResponses):
        return count_answers(recipe.evaluate, folder)
    return count_images(json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"])


def _rows(plan: Mapping[str, Sequence[Recipe]]) -> list[Row]:
    """The base model's row, and one for the runs of each recipe."""
    counted = {name: [_counted(one) for one in planned] for name, planned in plan.items()}
    base = next(iter(counted.values()))[0][0]
    rows = [Row("base", "", 1, 0, [(counts, over_runs(counts, [counts])) for counts in base])]
    for name, runs in counted.items():
        each = zip(base, zip(*(after for _, after in runs), strict=True), strict=True)
        method, train = plan[name][0].method.name, plan[name][0].train
        pairs = train.steps * train.batch_size * train.accumulate
        rows.append(Row(name, method, len(runs), pairs, [(counts, over_runs(counts, after)) for counts, after in each]))
    return rows


# ------------------------------------------------------------------------------------------------------------ the table


def _means(runs: Runs) -> Mapping[str, Interval]:
    return runs.means


def _changes(runs: Runs) -> Mapping[str, Interval]:
    return runs.changes


def _markdown(rows: Sequence[Row], command: str) -> str:
    """Two tables: what every row came to, and what changed from the base model, bold where it surely did."""
    base, *others = rows
    labels = [f"{label}, %" if share else label for label, share, _ in base.cells(_means)]
    values = [
        [row.name, row.method, *([str(row.runs), f"{row.pairs:,}"] if row.pairs else ["", ""]), *_shown(row, _means)]
        for row in rows
    ]
    changes = [[row.name, *_shown(row, _changes)] for row in others]
    asked = " and ".join(f"{len(counts.keys):,} of {counts.benchmark}" for counts, _ in base.measured)
    return "\n".join(
        [
            *_lines(["", "method", "runs", "pairs seen", *labels], values),
            "",
            "Change from the base model, paired by question; bold where the interval leaves out 0:",
            "",
            *_lines(["", *labels], changes),
            "",
            f"Means over runs that differ in their seed, with 95 % intervals over questions ({asked}) and runs.",
            f"Made by `{command}`.",
            "",
        ]
    )


def _shown(row: Row, of: Callable[[Runs], Mapping[str, Interval]]) -> Iterator[str]:
    """A row's cells: shares in percent; of changes those in bold whose interval leaves out 0."""
    signed = of is _changes
    for _, share, interval in row.cells(of):
        text = interval.points(signed=signed) if share else str(interval)
        yield f"**{text}**" if signed and (interval.low > 0 or interval.high < 0) else text


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _write(file: Path, markdown: str, rows: Sequence[Row]) -> None:
    assemble.make_folder("compare", file.parent)
    numbers = json.dumps([row.as_dict() for row in rows], indent=1)
    for path, text in ((file, markdown), (file.with_suffix(".json"), numbers)):
        with written(path) as part:
            part.write_text(text, encoding="utf-8")
