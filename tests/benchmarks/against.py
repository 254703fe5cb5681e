"""Comparison of a recipe's step with another program's, on the same model, pairs and random numbers, in one process.

    python -m tests.benchmarks.against sd_middle diffusers --variant "data.cache='off'"
    python -m tests.benchmarks.against llava_middle trl --set model.tune=full --json bench.json

RECIPE is a recipe, or a case of random weights (`cases`). Beside the numbers of `mmalign bench`, the report has:

- the time of filling the caches;
- the distance of the programs' loss and gradient on the first batch;
- the memory that weights and optimizer state require.

A baseline with another gradient is never timed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.atomic_io import write_json
from mmalign.commands import _bench_run, bench
from mmalign.commands._bench_run import Run
from mmalign.commands.bench import MMALIGN, Report
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.console import configure_logging
from tests.benchmarks import cases, peers
from tests.benchmarks.equality import Apart, First, apart_in_float32, first_gradient, require_same
from tests.benchmarks.filling import TimedFilling
from tests.benchmarks.peers import Peer, use_peer

logger = logging.getLogger("mmalign.benchmarks")
Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A recipe or case, assignments for all runs, variants with further assignments, and a baseline's name, or None."""

    source: Source
    overrides: Sequence[str] = ()
    variants: Sequence[str] = ()
    peer: str | None = None


@dataclass(frozen=True)
class Entry:
    """A run to measure: its recipe, a change to it, and the baseline that makes its updates, if any."""

    recipe: Recipe
    change: Callable[[Run], Run] = lambda run: run
    peer: Peer | None = None


@dataclass
class ModelQuirks:
    """Facts about a run beside its measurements."""

    filling: TimedFilling = field(default_factory=TimedFilling)
    state_bytes: int = 0
    apart: Apart | None = None  # distance from the first run


def with_alike(request: Request, num_processes: int) -> Request:
    """Return the request with the assignments that make the recipe and its baseline compute the same.

    Raises:
        ValueError: a package is missing, or the baseline has no step for the recipe.
    """
    if request.peer is None:
        return request
    peer, recipe = peers.find(request.peer), load_recipe(request.source, request.overrides)
    peer.check(recipe, num_processes)
    return replace(request, overrides=[*request.overrides, *peer.alike(recipe)])


def recipes_of(request: Request) -> dict[str, Recipe]:
    """Return the recipes of all runs by name."""
    changes = {MMALIGN: (), **{variant: variant.split() for variant in request.variants}}
    if request.peer is not None:
        changes[request.peer] = peers.load(request.peer).own
    return {name: load_recipe(request.source, [*request.overrides, *change]) for name, change in changes.items()}


def against(request: Request, *, repeats: int = 5) -> Report:
    """Measure a recipe or a case, its variants and a baseline.

    Raises:
        ValueError: a recipe does not fit, a case needs a GPU, or the baseline computes something else.
    """
    peer = {request.peer: peers.find(request.peer)} if request.peer else {}
    accelerator = open_accelerator(request)
    with bench.shared_folder(accelerator) as folder:
        opened = replace(request, source=cases.open_source(request.source, folder, accelerator))
        recipes = recipes_of(with_alike(opened, accelerator.num_processes))
        entries = {name: Entry(recipe, peer=peer.get(name)) for name, recipe in recipes.items()}
        return measure(str(request.source), entries, folder, accelerator, repeats=repeats)


def open_accelerator(request: Request) -> Any:
    """Return the accelerator of all runs; at this point no file of a case exists."""
    source = cases.content_of(request.source, Path())
    return bench.open_common_accelerator(recipes_of(replace(request, source=source)))


def measure(
    name: str,
    entries: Mapping[str, Entry],
    folder: Path,
    accelerator: Any,
    comparisons: Sequence[tuple[str, str]] = (),
    *,
    repeats: int,
) -> Report:
    """Measure entries and compare each with the first one; `comparisons` adds further pairs.

    Raises:
        ValueError: a baseline's step differs from the first entry's.
    """
    (first, entry), *_ = entries.items()
    facts, first_gradients = {run: ModelQuirks() for run in entries}, list[First]()
    in_float32 = entry.recipe.train.precision == "float32"
    for run, other in entries.items():
        if other.peer is not None and not in_float32:
            logger.info(f"{run}: compared in float32")
            require_same(run, apart_in_float32(entry.recipe, other.recipe, other.peer, folder / "float32", accelerator))

    def build(run_name: str, folder: Path, updates: int) -> Run:
        given, known = entries[run_name], facts[run_name]
        run = given.change(_bench_run.build(given.recipe, accelerator, folder, updates, fill=known.filling))
        run = run if given.peer is None else use_peer(run, given.peer)
        gradient = first_gradient(run, given.peer)
        first_gradients.extend([] if first_gradients else [gradient])
        known.apart = gradient.apart(first_gradients[0])
        moving = 3 * sum(p.nbytes for p in run.policy.trainable())  # gradient and two moments
        known.state_bytes = moving + sum(x.nbytes for x in _bench_run.weights(run) if x.device.type == run.device.type)
        if given.peer is not None and in_float32:
            require_same(run_name, known.apart)
        return run

    def builder(run_name: str) -> bench.Build:
        return lambda folder, updates: build(run_name, folder, updates)

    runs = bench.measure({run: builder(run) for run in entries}, accelerator, repeats)
    report = bench.make_report(name, entry.recipe, runs, accelerator)
    for run in entries:
        report.costs[run]["filling ms/pair"] = 1000 * facts[run].filling.seconds
    for run, other_run in [*((run, first) for run in list(entries)[1:]), *comparisons]:
        ratios = bench.ratios(runs[run], runs[other_run])
        ratios |= _further_ratios(runs[run], runs[other_run], facts[run], facts[other_run], is_first=other_run == first)
        report.ratios[f"{run} / {other_run}"] = ratios
    return report


def _further_ratios(
    run: bench.Measured, other: bench.Measured, quirks: ModelQuirks, other_facts: ModelQuirks, *, is_first: bool
) -> bench.Numbers:
    """Return the ratios that follow from facts; equality is known beside the first run alone."""
    apart = quirks.apart if is_first else None
    epochs = [
        (a / run.num_pairs + quirks.filling.seconds) / (b / other.num_pairs + other_facts.filling.seconds)
        for a, b in zip(run.seconds, other.seconds, strict=True)
    ]
    return {
        "time of one epoch": statistics.median(epochs),
        "expected MB more": (quirks.state_bytes - other_facts.state_bytes) / 1e6,
        "loss apart": apart and apart[0],
        "gradient apart": apart and apart[1],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a request."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"a recipe, or one of {', '.join(cases.CASES)}")
    parser.add_argument("peer", metavar="PEER", nargs="?", choices=peers.NAMES, help=" or ".join(peers.NAMES))
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change the recipe for all runs"
    )
    parser.add_argument(
        "--variant", metavar="'KEY=VALUE ...'", action="append", default=[], help="measure the recipe with this change"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each run")
    parser.add_argument("--json", type=Path, help="a file for the numbers")


def request_of(options: argparse.Namespace) -> Request:
    """Return the request that the arguments describe."""
    return Request(options.recipe, options.set, options.variant, options.peer)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a command."""
    parser = argparse.ArgumentParser(description="A recipe's step beside another program's.")
    add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the numbers."""
    configure_logging()
    options = parse(arguments)
    report = against(request_of(options), repeats=options.repeats)
    bench.show(report)
    if options.json:
        write_json(options.json, asdict(report))


if __name__ == "__main__":
    main()
