"""The command `bench`: measure the training step of a recipe and of its variants.

Pairs per second come from updates without a meter. Peak memory is that of tensors. On CUDA it is the maximum that
torch's allocator gave out. On a CPU it is the sum of all live storages that the step touched, with weights and
optimizer state. This sum is the same on every machine. It excludes the kernels' buffers, Python and its libraries.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table

from mmalign.atomic_io import prepare_file, write_json
from mmalign.commands import preflight
from mmalign.commands._bench_meters import PARTS, Meter, machine, now, peak_rate
from mmalign.commands._bench_run import Run, build, count_operations, peak_bytes, weights
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import pairs_per_update
from mmalign.config import Recipe
from mmalign.methods import requirements_of
from mmalign.modalities import loading
from mmalign.reading.weights import plain_tensors
from mmalign.training.launch import open_accelerator

logger = logging.getLogger(__name__)

Numbers = dict[str, float | list[float] | None]  # quantity -> a number, or one for each repeat
Build = Callable[[Path, int], Run]  # (folder for caches, updates at most) -> a run

MMALIGN = "mmalign"  # the name of the unchanged recipe's run
WARM_UP = 2  # updates, after which optimizer state and the kernels' plans exist
MAX_UPDATES = 10  # of one measurement on a GPU


@dataclass
class Measured:
    """Raw numbers of a run.

    Attributes:
        num_pairs: pairs of an update, over all processes; two generated outputs are a pair.
        operations: operations of an update by part, of one process.
        repeated: operations that backward repeats with gradient checkpointing.
        weight_bytes: bytes of all networks.
        step_bytes: peak of all other bytes of one process: activations, gradients, optimizer state, the batch.
        seconds: seconds of an update in every repeat, without a meter.
        parts: seconds of an update in every repeat by part, with a meter.
    """

    num_pairs: int
    operations: dict[str, int]
    repeated: int
    weight_bytes: int
    step_bytes: int
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})


@dataclass(frozen=True)
class Report:
    """Content of the JSON file: raw numbers and costs by run, ratios by "run / other run"."""

    title: str
    machine: dict[str, str | int | float]
    runs: dict[str, Measured]
    costs: dict[str, Numbers]
    ratios: dict[str, Numbers]


def bench(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    repeats: int = 5,
    json: Path | None = None,
) -> Report:
    """Measure a recipe's step, print the tables, and write the numbers.

    Args:
        source: a recipe: a path, a shipped name, or the content.
        overrides: assignments for all runs.
        variants: assignments of each variant, separated by spaces.
        repeats: number of measurements of each run.
        json: a file for the numbers.

    Raises:
        ValueError: a recipe is invalid, or `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"--repeats: got {repeats}; expected at least 1")
    prepare_file("--json", json)
    recipes = {MMALIGN: load_recipe(source, overrides)}
    recipes |= {variant: load_recipe(source, [*overrides, *variant.split()]) for variant in variants}
    accelerator = open_common_accelerator(recipes)
    builds = {name: partial(build, recipe, accelerator) for name, recipe in recipes.items()}
    report = make_report(str(source), recipes[MMALIGN], measure(builds, accelerator, repeats), accelerator)
    if accelerator.is_main_process:
        show(report)
        if json is not None:
            write_json(json, asdict(report))
            logger.info(f"{json}: the numbers")
    return report


def open_common_accelerator(recipes: Mapping[str, Recipe]) -> Any:
    """Return the accelerator that `mmalign train` opens for the first recipe; all runs share it.

    Raises:
        ValueError: only some recipes scale gradients (float16), or float16 has no GPU.
    """
    first = next(iter(recipes.values()))
    precisions = dict.fromkeys(recipe.train.precision for recipe in recipes.values())
    if "float16" in precisions and len(precisions) > 1:
        raise ValueError(
            f"--variant: got train.precision: {', '.join(precisions)}; expected float16 for all runs or for none, "
            "since only float16 scales gradients; measure float16 alone, with --set"
        )
    preflight.check_precision(first.train)
    return open_accelerator(first.train, rank_timeout=first.limits.rank_timeout)


@contextlib.contextmanager
def shared_folder(accelerator: Any) -> Iterator[Path]:
    """Yield a temporary folder that all processes share: the main process's."""
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") as own_folder:
        yield Path(broadcast_object_list([own_folder])[0])
        accelerator.wait_for_everyone()


def measure(builds: Mapping[str, Build], accelerator: Any, repeats: int) -> dict[str, Measured]:
    """Build, warm up, count and time every run.

    On a CPU all runs are in memory and alternate, in reverse order every second repeat, so that a slower machine slows
    all of them. On a GPU, where memory is short, each run is alone.

    Raises:
        ValueError: a run cannot be built.
    """
    gc.collect()  # a collection during a measurement would add to it
    device: torch.device = accelerator.device
    on_cpu, results = device.type == "cpu", dict[str, Measured]()
    # Warm-up; one update each to count bytes, to count operations and to find the rate; two for each repeat
    planned = WARM_UP + 3 + 2 * repeats * (1 if on_cpu else MAX_UPDATES)
    with shared_folder(accelerator) as folder:
        # On a CPU all runs take turns; on a GPU one at a time has the memory
        for names in [list(builds)] if on_cpu else [[name] for name in builds]:
            runs = dict[str, Run]()
            for name in names:
                logger.info(name)
                before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                runs[name] = builds[name](folder / f"{len(results)}", planned)
                results[name] = count(runs[name], before)
            # Measurements in turn, every other time in reverse order
            updates = 1 if on_cpu else updates_per_second(runs[names[0]])
            for number in range(repeats):
                logger.info(f"repeat {number + 1} of {repeats}")
                for name in names if number % 2 == 0 else names[::-1]:
                    time_once(runs[name], results[name], updates)
            # The next runs need this memory
            accelerator.free_memory()
            del runs
            gc.collect()
            torch.cuda.empty_cache()
    return results


def count(run: Run, before: int) -> Measured:
    """Warm a run up, and count its operations and bytes; `before` is CUDA's bytes before the run was built."""
    run.updates(run, WARM_UP, None)
    num_bytes = sum(
        x.nbytes for tensor in weights(run) for x in plain_tensors(tensor) if x.device.type == run.device.type
    )
    step_bytes = peak_bytes(run, before) - num_bytes
    operations, repeated = count_operations(run)
    recipe, num_processes = run.recipe, run.train_state.accelerator.num_processes
    num_pairs = pairs_per_update(recipe.train, requirements_of(recipe.method), num_processes)
    return Measured(num_pairs, operations, repeated, num_bytes, step_bytes)


def updates_per_second(run: Run) -> int:
    """Return the number of updates that take about a second, from 1 to `MAX_UPDATES`."""
    started = now(run.device)
    rate = run.updates(run, 1, None) / (now(run.device) - started)
    return max(1, min(MAX_UPDATES, round(rate)))


def time_once(run: Run, result: Measured, updates: int) -> None:
    """Add the seconds of an update to the result, as a whole and by part."""
    started = now(run.device)
    done = run.updates(run, updates, None)
    result.seconds.append((now(run.device) - started) / done)
    # By part, in other updates: on a GPU a meter waits at the end of each part
    meter = Meter(lambda: now(run.device))
    done = run.updates(run, updates, meter)
    meter.switch("rest")
    for part, seconds in meter.totals.items():
        result.parts[part].append(seconds / done)


def make_report(name: str, recipe: Recipe, runs: Mapping[str, Measured], accelerator: Any) -> Report:
    """Return the report: costs of all runs, and ratios of each to the first."""
    options, device = recipe.train, accelerator.device
    rate = peak_rate(device, loading.DTYPES[options.precision])
    batches = (
        f"{options.gradient_accumulation_steps} batches of {options.batch_size}"
        if options.gradient_accumulation_steps > 1
        else options.batch_size
    )
    title = f"{name}: {recipe.method.name}, {recipe.model.tune}, {options.precision}, {batches} pairs"
    if accelerator.num_processes > 1:
        title += f" on each of {accelerator.num_processes} processes"
    first, *others = runs
    return Report(
        title,
        {**machine(device), "matrix product GFLOP/s": rate / 1e9},
        dict(runs),
        {name: costs(run, rate) for name, run in runs.items()},
        {f"{name} / {first}": ratios(runs[name], runs[first]) for name in others},
    )


def costs(run: Measured, rate: float) -> Numbers:
    """Return the costs of a step; `rate` is the peak of a process on the device, in operations per second."""
    seconds, operations = statistics.median(run.seconds), sum(run.operations.values())
    return {
        "pairs/s": [run.num_pairs / seconds for seconds in run.seconds],
        **{f"{part} ms": 1000 * statistics.median(values) for part, values in run.parts.items()},
        "GFLOP": operations / 1e9,
        "repeated GFLOP": run.repeated / 1e9,
        "GFLOP/s": operations / seconds / 1e9,
        "share of peak": operations / seconds / rate,
        "peak MB": (run.weight_bytes + run.step_bytes) / 1e6,
    }


def ratios(run: Measured, other: Measured) -> Numbers:
    """Return a run's time and memory relative to another run's, and the time ratio that operations predict.

    The ratio of operations is not a bound: fewer or other kernels may beat it.
    """
    times = [a / b for a, b in zip(run.seconds, other.seconds, strict=True)]
    # Repeated operations take time as well
    operations, others = (sum(x.operations.values()) + x.repeated for x in (run, other))
    return {
        "time": times,
        "time by operations": operations / others,
        "measured / by operations": statistics.median(times) * others / operations,
        "peak MB more": (run.weight_bytes + run.step_bytes - other.weight_bytes - other.step_bytes) / 1e6,
        "memory without weights": run.step_bytes / other.step_bytes if other.step_bytes else None,
    }


def show(report: Report) -> None:
    """Print the tables of a report."""
    console = Console(highlight=False)
    console.print(", ".join(f"{key} {value}" for key, value in report.machine.items()), markup=False)
    console.print(table(report.title, report.costs))
    if report.ratios:
        console.print(table("one run to another", report.ratios))


def table(title: str, columns: Mapping[str, Numbers]) -> Table:
    """Return a table with a row for every quantity."""
    result = Table("", title=title)
    for name in columns:
        result.add_column(name, justify="right", overflow="fold")
    for quantity in dict.fromkeys(key for numbers in columns.values() for key in numbers):
        result.add_row(quantity, *(format_number(numbers.get(quantity)) for numbers in columns.values()))
    return result


def format_number(value: float | list[float] | None) -> str:
    """Format a number, or the median of several with their minimum and maximum."""
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{statistics.median(value):.2f} ({min(value):.2f} to {max(value):.2f})"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
