"""Cost of a pair as a quantity grows: pairs at a time, resolution, prompt, responses per prompt, or processes.

    python -m tests.benchmarks.scale resolution sd_middle diffusers --values 64 128 192 256 --plot resolution.png
    python -m tests.benchmarks.scale processes sd_middle --repeats 3

Every value is a separate measurement (`against`) with one more override. For resolution, prompt and responses, new
pairs are written. Results are seconds per pair, and bytes beyond the weights per pair that a process has at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mmalign.atomic_io import write_json
from mmalign.commands import bench
from mmalign.commands.bench import Report
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import ImageData, Recipe, ResponseData
from mmalign.console import configure_logging
from tests.benchmarks import against, cases
from tests.benchmarks.against import Request

logger = logging.getLogger("mmalign.benchmarks")

SIDE = 336  # pixels of written images


@dataclass(frozen=True)
class Axis:
    """A quantity that grows: its label on a plot, its usual values, and a function to the overrides for one value."""

    label: str
    values: Sequence[int]
    overrides: Callable[[Recipe, int, Path], list[str]]


def _batch_size(recipe: Recipe, value: int, folder: Path) -> list[str]:
    return [f"train.batch_size={value}"]


def _resolution(recipe: Recipe, value: int, folder: Path) -> list[str]:
    """Write images of that size, since reading would resize others."""
    if isinstance(recipe.data, ImageData):
        cases.write_image_pairs(folder / "pairs.parquet", value)
        return [*_written(folder / "pairs.parquet", "pick_a_pic"), f"data.resolution={value}"]
    cases.write_response_pairs(folder / "pairs.jsonl", side=value)
    return _written(folder / "pairs.jsonl", "trl")


def _prompt(recipe: Recipe, value: int, folder: Path) -> list[str]:
    return _responses_of(recipe, folder, prompt=value)


def _responses(recipe: Recipe, value: int, folder: Path) -> list[str]:
    overrides = _responses_of(recipe, folder, each=value)
    return [*overrides, f"train.batch_size={max(value, recipe.train.batch_size)}"]


def _responses_of(recipe: Recipe, folder: Path, prompt: int = 50, each: int = 1) -> list[str]:
    if not isinstance(recipe.data, ResponseData):
        raise ValueError(
            "prompt, responses: a text-to-image model reads every prompt in as many tokens, and compares two images; "
            "expected a recipe of a vision-language model; scale pairs, resolution or processes"
        )
    cases.write_response_pairs(folder / "pairs.jsonl", side=SIDE, prompt=prompt, each=each)
    return _written(folder / "pairs.jsonl", "trl")


def _written(file: Path, form: str) -> list[str]:
    return [f"data.path={json.dumps(str(file))}", f"data.format={form}", "data.columns={}"]


AXES = {
    "pairs": Axis("pairs at a time", (1, 2, 4, 8), _batch_size),
    "resolution": Axis("pixels of a side", (64, 128, 192, 256), _resolution),
    "prompt": Axis("characters of the prompt", (50, 200, 800), _prompt),
    "responses": Axis("pairs of responses to a prompt", (1, 2, 4, 8), _responses),
    "processes": Axis("processes", (1, 2), lambda *_: []),
}


def scale(axis: str, request: Request, values: Sequence[int] = (), *, repeats: int = 5) -> dict[int, Report]:
    """Return a report for each value, by default the usual ones.

    Raises:
        ValueError: the recipe has no such axis.
    """
    reports = {}
    for value in values or AXES[axis].values:
        logger.info(f"{AXES[axis].label}: {value}")
        if axis == "processes":
            reports[value] = _on_processes(value, request, repeats)
            continue
        with tempfile.TemporaryDirectory(prefix="mmalign-scale-") as folder:
            recipe = load_recipe(cases.content_of(request.source, Path(folder)), request.overrides)
            overrides = [*request.overrides, *AXES[axis].overrides(recipe, value, Path(folder) / "pairs")]
            reports[value] = against.against(replace(request, overrides=overrides), repeats=repeats)
    return reports


def _on_processes(number: int, request: Request, repeats: int) -> Report:
    """Return the main process's report of a run on several processes."""
    config = LaunchConfig(
        1, 1, number, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="forkserver"
    )
    reports: Mapping[int, Report] = elastic_launch(config, _measure_silently)(request, repeats)
    return reports[0]


def _measure_silently(request: Request, repeats: int) -> Report:
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for this process alone, which was started for this measurement
    return against.against(request, repeats=repeats)


def costs_of_a_pair(reports: Mapping[int, Report], by_processes: bool = False) -> dict[str, dict[str, list[float]]]:
    """Return two costs by run at every value: {cost: {run: [one per value]}}."""
    milliseconds, megabytes = dict[str, list[float]](), dict[str, list[float]]()
    for value, report in reports.items():
        for name, run in report.runs.items():
            milliseconds.setdefault(name, []).append(1000 * statistics.median(run.seconds) / run.num_pairs)
            pairs = run.num_pairs / (value if by_processes else 1)  # per process
            megabytes.setdefault(name, []).append(run.step_bytes / pairs / 1e6)
    return {"milliseconds of a pair": milliseconds, "MB of a pair beyond the weights": megabytes}


def plot(
    title: str, label: str, values: Sequence[int], costs: Mapping[str, Mapping[str, list[float]]], path: Path
) -> None:
    """Plot both costs over the axis, with a line for each run; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (cost, lines) in zip(figure.subplots(1, 2), costs.items(), strict=True):
        for name, numbers in lines.items():
            axes.plot(values, numbers, marker="o", label=name)
        axes.set(xlabel=label, ylabel=cost, xticks=values, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a command."""
    parser = argparse.ArgumentParser(description="The cost of a pair as something grows.")
    parser.add_argument("axis", choices=AXES)
    against.add_arguments(parser)
    parser.add_argument("--values", type=int, nargs="+", default=[], help="its usual ones if there are none")
    parser.add_argument("--plot", type=Path, help="a file for a plot, PNG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the costs, and write numbers and a plot."""
    configure_logging()
    options = parse(arguments)
    request, console = against.request_of(options), Console(highlight=False)
    reports = scale(options.axis, request, options.values, repeats=options.repeats)
    costs = costs_of_a_pair(reports, options.axis == "processes")
    for cost, lines in costs.items():
        columns = {name: dict(zip(map(str, reports), numbers, strict=True)) for name, numbers in lines.items()}
        console.print(bench.table(f"{cost}, over {AXES[options.axis].label}", columns))
    if options.json:
        write_json(options.json, {str(value): asdict(report) for value, report in reports.items()})
    if options.plot:
        plot(options.recipe, AXES[options.axis].label, list(reports), costs, options.plot)


if __name__ == "__main__":
    main()
