"""Progress bar, trackers and warnings of a training run."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from mmalign.console import print_through
from mmalign.training import verdict
from mmalign.training.trackers import log_curves

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Metrics that the bar shows if the method has them, and their short names.
SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "accuracy": "accuracy",
    "logit": "logit",
    "chosen error": "chosen",
    "rejected error": "rejected",
    "matched error": "matched",
    "mismatched error": "mismatched",
    "chosen log-probability": "chosen",
    "rejected log-probability": "rejected",
    "gradient norm": "grad",
}
NUM_FRESH = 64  # updates whose means a verdict may read
WIDE = 100  # columns of a terminal from which on the bar is long
RECENT = 32  # updates whose mean speed is shown


class Reporter:
    """Reports of mean metrics to the progress bar and the trackers.

    If the output is not a terminal, each report is a line instead of a bar. Log lines appear above the bar. Numbers
    that do not fit into the terminal's width are in such a line, never cut.

    Attributes:
        history: the mean metrics of every report.
        start: metrics of single pairs before the first update, for a verdict.
        rewards: the mean reward of each generation of outputs, for a verdict.
        num_measured: training batches that a verdict measures; a run that is extended keeps the number.
        verdict: a sentence on the run's outcome, after its last update.
    """

    def __init__(
        self, accelerator: Accelerator, steps: int, every: int, *, pairs_per_update: int = 1, first: int = 0
    ) -> None:
        self.accelerator, self.every, self.steps = accelerator, every, steps
        self.speed = _Speed(steps, pairs_per_update)
        self.console = Console(quiet=not accelerator.is_main_process, stderr=True)
        # The bar, and the numbers that fit beside it
        self.numbers = list[str]()
        self.bar_width = 24 if self.console.width >= WIDE else 6
        columns = [
            TextColumn("train"),
            BarColumn(self.bar_width),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[numbers]}", markup=False),
        ]
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=first, speed="", numbers="")
        # Sums since the last report
        self.sums: dict[str, Tensor] = {}
        self.count, self.history, self.warned = 0, list[dict[str, float]](), False
        # What the verdict will read
        self.start: dict[str, list[float]] = {}
        self.rewards, self._generation = list[float](), (-1, -1)
        self.num_measured, self.verdict = 0, ""
        self._fresh = deque[dict[str, Tensor]](maxlen=NUM_FRESH)

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint: history, fresh updates, and sums of metrics since the last report."""
        # On the CPU, as a checkpoint may be loaded on another device
        sums, *fresh = ({name: x.cpu() for name, x in each.items()} for each in (self.sums, *self._fresh))
        reports = {"count": self.count, "history": self.history, "warned": self.warned, "start": self.start}
        reports |= {"num_measured": self.num_measured, "verdict": self.verdict}
        reports |= {"rewards": self.rewards, "generation": self._generation}
        return {**reports, "sums": sums, "fresh": fresh}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint; nothing for an empty one."""
        if state:
            device = self.accelerator.device
            self.sums = {name: value.to(device) for name, value in state["sums"].items()}
            self.count, self.history, self.warned = state["count"], list(state["history"]), state["warned"]
            self.start, self.num_measured = dict(state["start"]), state["num_measured"]
            self.rewards, self._generation = list(state["rewards"]), state["generation"]
            self.verdict = state["verdict"]
            self._fresh = deque(state["fresh"], maxlen=NUM_FRESH)

    def __enter__(self) -> Reporter:
        self.speed.start(int(self.bar.tasks[0].completed))
        self.bar.start()
        print_through(self.console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        print_through(None)
        self.bar.stop()

    def update(self, step: int, metrics: Mapping[str, Tensor], *, is_fresh: bool = True) -> None:
        """Add an update's metrics; report after every `every` updates and after the last.

        The metrics of the last updates with fresh pairs, which were not trained on before, are kept for the verdict.
        """
        means = {name: value.detach().float() for name, value in metrics.items()}  # on its device: no wait for a GPU
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + value
        if is_fresh:
            self._fresh.append(means)
        self.count += 1
        if step % self.every == 0 or step == self.steps:
            self._report(step)
        speed = self.speed.now(step)
        self.bar.update(self.task, completed=step, speed=speed, numbers="  ".join(self.fitting(speed)))

    def add_reward(self, epoch: int, batch: int, reward: Tensor) -> None:
        """Keep a mean reward for the verdict if it is the first of a batch, whose updates share one generation."""
        if (epoch, batch) != self._generation:
            self._generation = (epoch, batch)
            self.rewards.append(float(reward))

    def _report(self, step: int) -> None:
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        self.history.append(means)
        self.accelerator.log(means, step=step)
        log_curves(self.accelerator, means, step)
        # Numbers of the bar, or a line where there is no bar or no room
        self.numbers = [f"{short} {means[name]:.4g}" for name, short in SHOWN.items() if name in means]
        speed = self.speed.now(step)
        if not self.console.is_terminal or self.fitting(speed) != self.numbers:
            line = "  ".join(filter(None, [f"update {step}/{self.steps}", *self.numbers, speed]))
            self.console.print(line, highlight=False, soft_wrap=True)
        self._warn(step, means)

    def fitting(self, speed: str) -> list[str]:
        """Return the first of the last report's numbers that fit into the terminal beside the bar and the speed."""
        # Columns that the bar takes without its numbers
        used = len(f"train  {self.steps}/{self.steps} {speed} ") + self.bar_width
        ends = accumulate(len(number) + 2 for number in self.numbers)
        return [x for x, end in zip(self.numbers, ends, strict=True) if used + end - 2 <= self.console.width]

    def fresh(self) -> dict[str, list[float]]:
        """Return the mean metrics of each of the last updates with fresh pairs: 16, or half of them if these are more.

        At most 64 updates are known.
        """
        means = list(self._fresh)[-max(16, len(self._fresh) // 2) :]
        names = set.intersection(*(set(each) for each in means)) if means else set()
        return {name: [float(each[name]) for each in means] for name in sorted(names)}

    def _warn(self, step: int, means: Mapping[str, float]) -> None:
        """Warn once of a pair loss that is broken, saturated, or has hardly moved.

        The first update says nothing, since every logit is 0. A loss that has hardly moved counts only in the second
        half of the run: before, the learning rate may still be warming up.
        """
        if "gradient factor" not in means or self.warned or step == 1:
            return
        # The preferred side, or the only one, as the method names it
        side = next(side for side in (*(first for first, _ in verdict.SIDES), "output") if f"{side} gain" in means)
        # One problem is named, the gravest
        broken = verdict.broken({name: [value] for name, value in means.items()}, side)
        if broken:
            problem = f"the model is breaking, {broken}: lower train.lr"
        elif means["saturated"] >= verdict.MANY:
            problem = "the loss is saturated: method.beta or train.lr is too large"
        elif means["logit size"] < verdict.UNMOVED and step >= self.steps // 2:
            problem = "the loss has hardly moved: method.beta or train.lr is too small"
        else:
            return
        self.warned = True
        logger.warning(f"warning: mean |logit| {means['logit size']:.2g}: {problem}")


class _Speed:
    """Pairs per second and remaining time, by the clock of the last updates: data, saving and evaluation included."""

    def __init__(self, steps: int, pairs_per_update: int) -> None:
        self.steps, self.pairs_per_update = steps, pairs_per_update
        self.times = deque([(0, time.monotonic())], maxlen=RECENT + 1)

    def start(self, step: int) -> None:
        """Begin to measure after `step` updates."""
        self.times.clear()
        self.times.append((step, time.monotonic()))

    def now(self, step: int) -> str:
        """Return the speed after `step` updates, as "3.21 pairs/s  ETA 0:12:30"."""
        if step < self.times[-1][0]:  # back at a checkpoint
            self.start(step)
        elif step > self.times[-1][0]:
            self.times.append((step, time.monotonic()))
        (first, since), (last, until) = self.times[0], self.times[-1]
        if last == first or until <= since:  # nothing is measured yet
            return ""
        rate = (last - first) / (until - since)
        pairs = rate * self.pairs_per_update
        minutes, seconds = divmod(round((self.steps - step) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{pairs:{'.0f' if pairs >= 1000 else '.3g'}} pairs/s  ETA {hours}:{minutes:02}:{seconds:02}"
