"""Runs measured side by side: pairs per second, seconds by part, operations, memory, and whether they compute the same.

Pairs per second are taken from updates without a meter. On a CPU all runs are in memory and take turns in every repeat,
there and back, so that a machine that slows down slows all of them; ratios are taken within a repeat. On a GPU, where
memory is what is short, each run is alone.

Peak memory is that of tensors. On CUDA it is what torch's allocator gave out at most. On the CPU it is the sum of
all storages alive that the step has touched, with the weights and the optimizer's state: exact and the same on every
machine, but without what a kernel uses inside itself, and without Python and its libraries (some hundred MB).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from mmalign.benchmark import runs
from mmalign.benchmark.meters import PARTS, Meter, now
from mmalign.benchmark.runs import First, Run

WARM_UP = 2  # updates: the optimizer's state and the kernels' plans exist afterwards
MOST, SECONDS = 10, 1.0  # updates of a measurement on a GPU at most, and how long they are to take together


class Build(Protocol):
    """Puts a run together, with a folder for its caches, and for so many updates at most."""

    def __call__(self, *, folder: Path, updates: int) -> Run:
        """The run."""


@dataclass(frozen=True)
class Entrant:
    """What takes part: its name, how to build it, and how far its first gradient may be from the first entrant's.

    That is a share of the norm; None leaves it open.
    """

    name: str
    build: Build
    limit: float | None = None


@dataclass
class Measured:
    """A run's numbers.

    Attributes:
        variant: its name.
        batch_size: pairs of an update, of all processes.
        whole: seconds of an update in every repeat, without a meter.
        parts: likewise by part, with one.
        flops: operations of an update by part, of one process.
        state_bytes: what is known beforehand: every network, and the gradient and two moments of what is trained.
        peak_bytes: measured, of one process.
        weight_bytes: of every network.
        repeated: operations of an update that backward does once more, with checkpointed activations.
        processes: that work together.
        filling: seconds of a pair that making what is kept beforehand took; once, for a training of one epoch.
        loss: the mean of the first batch, at weights that were moved a little off the reference.
        loss_apart: how far that is from the first entrant's; None where other weights learn.
        gradient_apart: likewise the gradient, as a share of the first entrant's norm.
    """

    variant: str
    batch_size: int
    whole: list[float]
    parts: dict[str, list[float]]
    flops: dict[str, int]
    state_bytes: int
    peak_bytes: int
    weight_bytes: int = 0
    repeated: int = 0
    processes: int = 1
    filling: float = 0.0
    loss: float = field(default=float("nan"))
    loss_apart: float | None = None
    gradient_apart: float | None = None

    @property
    def operations(self) -> int:
        """Of an update, with what is repeated, of one process."""
        return sum(self.flops.values()) + self.repeated

    @property
    def beyond(self) -> int:
        """Peak bytes without the weights, of one process: activations, gradients, optimizer's state, what is read."""
        return self.peak_bytes - self.weight_bytes

    @property
    def bytes_of_a_pair(self) -> float:
        """Peak bytes beyond the weights, of one of the pairs that a process has at a time."""
        return self.beyond * self.processes / self.batch_size

    @property
    def seconds_of_a_pair(self) -> list[float]:
        """In every repeat, without a meter."""
        return [seconds / self.batch_size for seconds in self.whole]


def measure(
    entrants: Sequence[Entrant], folder: Path, *, repeats: int, device: torch.device, say: Callable[[str], None]
) -> list[Measured]:
    """Every entrant: built, compared with the first, warmed up, counted, and timed.

    Args:
        entrants: the first is what the others are compared with.
        folder: for caches, a folder in it for each.
        repeats: measurements of each.
        device: where they run.
        say: hears what is being done.

    Raises:
        ValueError: one cannot be built, or computes something else than it is compared with.
    """
    gc.collect()  # what is left of others would be freed in the middle of a measurement
    together, updates = device.type == "cpu", 1 if device.type == "cpu" else MOST
    planned = WARM_UP + 3 + 2 * repeats * updates
    alive, rows = list[Run](), list[Measured]()
    compared: First | None = None
    for number, entrant in enumerate(entrants):
        say(entrant.name)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        run = entrant.build(folder=folder / f"{number}", updates=planned)
        first = runs.first_gradient(run)
        compared = compared or first
        apart = first.beside(compared)
        require_same(entrant, apart)
        row = _counted(entrant.name, run, before)
        row.loss, (row.loss_apart, row.gradient_apart) = first.loss, apart or (None, None)
        rows.append(row)
        if together:
            alive.append(run)
            continue
        enough = _enough(run)
        for _ in range(repeats):
            time_once(run, row, enough)
        run.learner.accelerator.free_memory()
        del run
        gc.collect()
        torch.cuda.empty_cache()
    for number, turns in enumerate(_turns(alive, rows, repeats)):
        say(f"repeat {number + 1} of {repeats}")
        for run, row in turns:
            time_once(run, row, 1)
    for run in alive:
        run.learner.accelerator.free_memory()
    return rows


def require_same(entrant: Entrant, apart: tuple[float, float] | None) -> None:
    """Refuse to time against one another what computes different things.

    Args:
        entrant: the other one.
        apart: how far its loss and its gradient are from the first's; None if other weights learn.

    Raises:
        ValueError: it is further than its limit.
    """
    if entrant.limit is not None and (apart is None or not apart[1] <= entrant.limit):
        came = "other weights learn" if apart is None else f"the losses differ by {apart[0]:.2g}, the gradients by "
        came += "" if apart is None else f"{apart[1]:.2g} of their norm, and expected was at most {entrant.limit:g}"
        raise ValueError(
            f"bench: {entrant.name} does not compute what it is compared with ({came}), so their times say nothing; "
            "leave it out, or report this with the recipe"
        )


def _turns(alive: Sequence[Run], rows: Sequence[Measured], repeats: int) -> Iterator[list[tuple[Run, Measured]]]:
    """The order of every repeat, there and back; none if nothing is alive."""
    pairs = list(zip(alive, rows, strict=False))
    for number in range(repeats if pairs else 0):
        yield pairs if number % 2 == 0 else pairs[::-1]


def _counted(name: str, run: Run, before: int) -> Measured:
    """A run warmed up and counted, not yet timed."""
    runs.advance(run, WARM_UP)
    peak = runs.peak_bytes(run, before)
    flops, repeated = runs.count_operations(run)
    empty: dict[str, list[float]] = {part: [] for part in PARTS}
    state, weights = runs.state_bytes(run), runs.weight_bytes(run)
    processes = int(run.learner.accelerator.num_processes)
    return Measured(name, run.pairs, [], empty, flops, state, peak, weights, repeated, processes, run.filling)


def _enough(run: Run) -> int:
    """How many updates take about `SECONDS`."""
    started = now(run.device)
    runs.advance(run, 1)
    return max(1, min(MOST, round(SECONDS / (now(run.device) - started))))


def time_once(run: Run, row: Measured, updates: int) -> None:
    """Add to the row the seconds of an update, as a whole and by part."""
    started = now(run.device)
    runs.advance(run, updates)
    row.whole.append((now(run.device) - started) / updates)
    meter = Meter(lambda: now(run.device))
    runs.advance(run, updates, meter)
    meter.switch("rest")
    for part, seconds in meter.total.items():
        row.parts[part].append(seconds / updates)
