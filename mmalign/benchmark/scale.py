"""What a pair costs as something grows: pairs at a time, resolution, prompt, responses of a prompt, processes.

Every point is a benchmark of its own, of the recipe, its variants and another program, with one more override; for
prompts and responses the pairs are drawn anew. Points are seconds of a pair and, beyond the weights, bytes of a pair:
of one of those that a process has at a time. With several processes seconds are of the clock on the wall.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmalign.benchmark import bench, tables
from mmalign.benchmark.bench import Asked
from mmalign.benchmark.cases import draw_image_pairs, draw_response_pairs
from mmalign.benchmark.measure import Measured
from mmalign.config import ImageData, Recipe, ResponseData

Say = Callable[[str], None]
SIDE = 336  # pixels of drawn pictures


@dataclass(frozen=True)
class Axis:
    """Something that grows: what it is called on a plot, its usual values, and the overrides for one of them."""

    label: str
    values: Sequence[int]
    overrides: Callable[[Recipe, int, Path], list[str]]


@dataclass(frozen=True)
class Scaling:
    """What was measured at every value; `machine` as in a report."""

    machine: dict[str, str | int]
    title: str
    label: str
    points: dict[int, list[Measured]]


def _pairs(recipe: Recipe, value: int, folder: Path) -> list[str]:
    return [f"train.batch_size={value}"]


def _resolution(recipe: Recipe, value: int, folder: Path) -> list[str]:
    """Pictures of that size; drawn, for another size than their own would cost reading and resizing."""
    if isinstance(recipe.data, ImageData):
        file = folder / "pairs.parquet"
        draw_image_pairs(file, value)
        return [*_drawn(file, "pick_a_pic"), f"data.resolution={value}"]
    file = folder / "pairs.jsonl"
    draw_response_pairs(file, side=value)
    return _drawn(file, "trl")


def _prompt(recipe: Recipe, value: int, folder: Path) -> list[str]:
    return _said(recipe, folder, prompt=value)


def _responses(recipe: Recipe, value: int, folder: Path) -> list[str]:
    return [*_said(recipe, folder, each=value), f"train.batch_size={max(value, recipe.train.batch_size)}"]


def _said(recipe: Recipe, folder: Path, prompt: int = 50, each: int = 1) -> list[str]:
    if not isinstance(recipe.data, ResponseData):
        raise ValueError(
            "--scale: a text-to-image model is shown every prompt in as many tokens, and compares two images; expected "
            "a recipe of a vision-language model, or --scale pairs, resolution or processes"
        )
    file = folder / "pairs.jsonl"
    draw_response_pairs(file, side=SIDE, prompt=prompt, each=each)
    return _drawn(file, "trl")


def _drawn(file: Path, form: str) -> list[str]:
    return [f"data.path={json.dumps(str(file))}", f"data.format={form}", "data.columns={}"]


AXES = {
    "pairs": Axis("pairs at a time", (1, 2, 4, 8), _pairs),
    "resolution": Axis("pixels of a side", (64, 128, 192, 256), _resolution),
    "prompt": Axis("characters of the prompt", (50, 200, 800), _prompt),
    "responses": Axis("pairs of responses to a prompt", (1, 2, 4, 8), _responses),
    "processes": Axis("processes", (1, 2), lambda *_: []),
}


def scale(
    source: str,
    by: str,
    *,
    values: Sequence[int] = (),
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    peer: str | None = None,
    repeats: int = 3,
    json: Path | None = None,
    plot: Path | None = None,
    say: Say = print,
) -> Scaling:
    """Measure a recipe's step at several values, print what a pair costs at each, and write numbers and a plot.

    Args:
        source: a recipe, or the name of a case.
        by: what grows, a key of `AXES`.
        values: of it; its usual ones if there are none.
        overrides: of the recipe, for all.
        variants: each some assignments with spaces between them, measured beside the recipe.
        peer: another program.
        repeats: measurements of each.
        json: a file for the numbers.
        plot: a file for the plot, PNG.
        say: hears what is being done.

    Raises:
        ValueError: there is no such axis, or the recipe has none.
    """
    if by not in AXES:
        raise ValueError(f"--scale: there is no {by!r}; expected one of {', '.join(AXES)}")
    bench.check(repeats, peer)
    if any(value < 1 for value in values):
        raise ValueError(f"--values: expected numbers of at least 1, got {min(values)}")
    wanted = values or AXES[by].values
    asked = Asked(source, overrides, [variant.split() for variant in variants], peer)
    found = _processes(asked, wanted, repeats, say) if by == "processes" else _here(asked, by, wanted, repeats, say)
    scaling = Scaling(found[0].machine, source, AXES[by].label, _points(wanted, found))
    show(scaling)
    if json is not None:
        write(scaling, json)
        say(f"{json}: the numbers")
    if plot is not None:
        draw(scaling, plot)
        say(f"{plot}: the plot")
    return scaling


def _points(values: Sequence[int], reports: Sequence[tables.Report]) -> dict[int, list[Measured]]:
    rows = (next(iter(report.models.values())) for report in reports)
    return dict(zip(values, rows, strict=True))


def _here(asked: Asked, by: str, values: Sequence[int], repeats: int, say: Say) -> list[tables.Report]:
    """A report for each value, by this process."""
    accelerator, found = bench.accelerator_for(asked), list[tables.Report]()
    with bench.scratch(accelerator) as folder:
        source = bench.open_source(str(asked.source), folder, accelerator, say)
        opened = replace(asked, source=source)
        for value in values:
            say(f"{AXES[by].label}: {value}")
            place = folder / f"{by} {value}"
            more = AXES[by].overrides(opened.plain(), value, place)
            one = replace(opened, overrides=[*asked.overrides, *more])
            found.append(bench.run(one, place, accelerator, name=str(asked.source), repeats=repeats, say=say))
    return found


def _processes(asked: Asked, values: Sequence[int], repeats: int, say: Say) -> list[tables.Report]:
    """A report for each number of processes, which are started here."""
    import tempfile

    import torch

    found = []
    environment = {**os.environ, **({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})}
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") as folder:
        for value in values:
            say(f"processes: {value}")
            file = Path(folder) / f"{value}.json"
            options = [f"--set={assignment}" for assignment in asked.overrides]
            options += [f"--variant={' '.join(changes)}" for changes in asked.variants]
            options += [f"--against={asked.peer}"] if asked.peer else []
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={value}", "-m", "mmalign.cli"]
            command = [sys.executable, *start, "bench", str(asked.source), f"--repeats={repeats}", f"--json={file}"]
            done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
            if done.returncode:
                last = next(
                    (line for line in done.stderr.splitlines() if line.startswith("error: ")), done.stderr[-500:]
                )
                raise ValueError(f"--scale processes: {value} processes did not come to an end: {last}")
            found.append(tables.read_report(file))
    return found


def show(scaling: Scaling) -> None:
    """Print what a pair costs at every value."""
    first = next(iter(scaling.points.values()))
    title = f"{scaling.title}: milliseconds of a pair, and MB of a process beyond the weights"
    table = Table(title=title, caption=str(scaling.machine["clock"]))
    table.add_column(scaling.label, justify="right")
    for row in first:
        table.add_column(row.variant, justify="right")
        table.add_column("MB", justify="right")
    for value, rows in scaling.points.items():
        cells = [(f"{_milliseconds(row):,.1f}", f"{row.beyond / 1e6:,.1f}") for row in rows]
        table.add_row(str(value), *(cell for pair in cells for cell in pair))
    Console(highlight=False).print(table)


def _milliseconds(row: Measured) -> float:
    """Of a pair, the median."""
    return 1000 * statistics.median(row.seconds_of_a_pair)


def write(scaling: Scaling, path: Path) -> None:
    """Everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(scaling), indent=1) + "\n")


def draw(scaling: Scaling, path: Path) -> None:
    """Milliseconds of a pair, and MB of a pair beyond the weights, over what grows; a line for each entrant; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = list(scaling.points)
    costs: list[tuple[Any, str, Callable[[Measured], float]]] = [
        (left, "milliseconds of a pair", _milliseconds),
        (right, "MB of a pair beyond the weights", lambda row: row.bytes_of_a_pair / 1e6),
    ]
    for axes, label, cost in costs:
        for lines in zip(*scaling.points.values(), strict=True):
            axes.plot(values, [cost(row) for row in lines], marker="o", label=lines[0].variant)
        axes.set(xlabel=scaling.label, ylabel=label, xticks=values, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(scaling.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
