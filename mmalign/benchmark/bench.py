"""`mmalign bench`: what a recipe's training step costs, beside changed recipes and beside other programs' steps.

A variant is a list of overrides of the recipe; another program is a file of `mmalign.benchmark.against`. The first
entrant is the recipe as it is, and all others are compared with it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.benchmark import against, cases, tables
from mmalign.benchmark.against import Peer
from mmalign.benchmark.measure import Build, Entrant, measure, require_same
from mmalign.benchmark.meters import machine, peak_rate
from mmalign.benchmark.proof import apart_in_float32
from mmalign.benchmark.runs import build
from mmalign.benchmark.tables import Comparison, Report
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.preflight import check_precision
from mmalign.commands.train import open_accelerator
from mmalign.config import Recipe
from mmalign.console import silent
from mmalign.modalities.loading import DTYPES

Say = Callable[[str], None]
Source = str | Path | Mapping[str, Any]
OURS = "mmalign"
SAME = 0.01  # of a gradient's norm: encoders round otherwise in a batch, and beta multiplies that


@dataclass(frozen=True)
class Asked:
    """What a person asked to have measured.

    Attributes:
        source: a recipe: a path, a shipped name, or the content.
        overrides: of the recipe, for all.
        variants: further overrides of one variant each.
        peer: the name of another program, or None.
    """

    source: Source
    overrides: Sequence[str] = ()
    variants: Sequence[Sequence[str]] = ()
    peer: str | None = None

    def plain(self) -> Recipe:
        """The recipe as a person gave it."""
        return load_recipe(self.source, self.overrides)

    def recipe(self, *more: str) -> Recipe:
        """The recipe, with what makes it the same as the peer's, which knows a step for it."""
        alike = against.find(self.peer).alike(self.plain()) if self.peer else ()
        return load_recipe(self.source, [*self.overrides, *alike, *more])


def bench(
    source: str,
    *,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    peer: str | None = None,
    repeats: int = 5,
    json: Path | None = None,
    say: Say = print,
) -> Report:
    """Measure a recipe's step, print the tables, and write the numbers.

    Args:
        source: a recipe, or the name of a case.
        overrides: assignments for all.
        variants: each some assignments with spaces between them, measured beside the recipe.
        peer: another program, measured on the same model and pairs.
        repeats: measurements of each.
        json: a file for the numbers.
        say: hears what is being done.

    Raises:
        ValueError: a recipe, a case or a program does not fit.
    """
    check(repeats, peer)
    asked = Asked(source, overrides, [variant.split() for variant in variants], peer)
    accelerator = accelerator_for(asked)
    tell = say if accelerator.is_main_process else silent
    with scratch(accelerator) as folder:
        asked = replace(asked, source=open_source(source, folder, accelerator, tell))
        report = run(asked, folder, accelerator, name=source, repeats=repeats, say=tell)
    if accelerator.is_main_process:
        tables.show(report)
        if json is not None:
            tables.write_report(report, json)
            tell(f"{json}: the numbers")
    return report


def check(repeats: int, peer: str | None) -> None:
    """Refuse at once what needs no model to be known wrong.

    Raises:
        ValueError: there is no such program, it is not installed, or nothing would be measured.
    """
    if repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {repeats}")
    if peer is not None:
        against.find(peer).available()


def accelerator_for(asked: Asked) -> Any:
    """The accelerator that `mmalign train` would have; there is one for all that is measured.

    Raises:
        ValueError: a recipe or a variant does not fit, one scales its gradients and another does not, or there is no
            GPU for that.
    """
    source = asked.source
    if isinstance(source, str) and source in cases.CASES:
        source = cases.content(source, Path())  # for what does not depend on where its files will be
    options = replace(asked, source=source).plain().train
    for changes in asked.variants:
        other = load_recipe(source, [*asked.overrides, *changes]).train.precision
        if "float16" in (other, options.precision) and other != options.precision:
            raise ValueError(
                f"--variant: {' '.join(changes)} has train.precision: {other} beside {options.precision}, and "
                "gradients are scaled in float16 alone, for all or for none; measure it by itself, with --set"
            )
    check_precision(options)
    return open_accelerator(options)


@contextlib.contextmanager
def scratch(accelerator: Any) -> Iterator[Path]:
    """A folder that all processes share, and that is gone afterwards."""
    from accelerate.utils import broadcast_object_list

    main = accelerator.is_main_process
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") if main else contextlib.nullcontext("") as folder:
        yield Path(broadcast_object_list([folder])[0])
        accelerator.wait_for_everyone()


def open_source(source: str, folder: Path, accelerator: Any, say: Say) -> Source:
    """A recipe as it came, or a case's, whose model and pairs the main process writes to the folder."""
    if source not in cases.CASES:
        return source
    say(f"{source}: {cases.CASES[source].about}, random weights")
    if accelerator.is_main_process:
        cases.write_case(source, folder / source, accelerator.device)
    accelerator.wait_for_everyone()
    return cases.content(source, folder / source)


def run(asked: Asked, folder: Path, accelerator: Any, *, name: str, repeats: int, say: Say) -> Report:
    """Measure what is asked; `name` is what the tables call it."""
    peer = against.find(asked.peer) if asked.peer is not None else None
    if peer is not None:
        peer.check(asked.plain(), accelerator.num_processes)
    recipe = asked.recipe()
    entrants = [Entrant(OURS, _entrant(recipe, accelerator))]
    comparisons = []
    for changes in asked.variants:
        title = " ".join(changes)
        entrants.append(Entrant(title, _entrant(asked.recipe(*changes), accelerator)))
        comparisons.append(Comparison(title, OURS, f"the recipe with {title}"))
    if asked.peer is not None and peer is not None:
        theirs = asked.recipe(*peer.own)
        entrants.append(rival(asked.peer, recipe, theirs, folder / "float32", accelerator, say))
        comparisons.append(Comparison(asked.peer, OURS, peer.about))
    device: torch.device = accelerator.device
    rate = peak_rate(device, DTYPES[recipe.train.precision])
    rows = measure(entrants, folder / "runs", repeats=repeats, device=device, say=say)
    options = recipe.train
    batches = f"{options.accumulate} batches of {options.batch_size}" if options.accumulate > 1 else options.batch_size
    title = f"{name}: {recipe.method.name}, {recipe.model.tune}, {options.precision}, {batches} pairs"
    if accelerator.num_processes > 1:
        title += f" on each of {accelerator.num_processes} processes"
    return Report(machine(device), {title: rows}, comparisons, rate)


def rival(name: str, ours: Recipe, theirs: Recipe, folder: Path, accelerator: Any, say: Say) -> Entrant:
    """Another program's step, which is held against ours: here if they compute in half precision, else when measured.

    Args:
        name: of the program.
        ours: the recipe that is measured.
        theirs: the same with the program's own settings.
        folder: for caches.
        accelerator: of all runs.
        say: hears what is being done.

    Raises:
        ValueError: it computes something else.
    """
    peer = against.find(name)
    other = Entrant(name, _entrant(theirs, accelerator, peer), SAME)
    if ours.train.precision == "float32":
        return other
    say(f"{name}: compared in float32")
    require_same(other, apart_in_float32(ours, theirs, peer, folder, accelerator))
    return replace(other, limit=None)


def _entrant(recipe: Recipe, accelerator: Any, peer: Peer | None = None) -> Build:
    """How a recipe, or a peer's step on it, is built."""
    return partial(build, recipe, accelerator=accelerator, peer=peer)
