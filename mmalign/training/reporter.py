"""Progress bar, trackers and final verdict of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mmalign.console import print_through

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Metrics that the bar shows if the method has them, and their short names.
SHOWN = {
    "loss": "loss",
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
SATURATED, UNMOVED = 1e-3, 0.499  # bounds of the mean gradient factor sigma(-z) of a pair loss that learns


class Reporter:
    """Reports of mean metrics to the progress bar and the trackers, with a history for the verdict.

    If the output is not a terminal, each report is a line instead of a bar. Log lines appear above the bar.
    """

    def __init__(self, accelerator: Accelerator, steps: int, every: int, *, first: int = 0) -> None:
        self.accelerator, self.every, self.steps = accelerator, every, steps
        self.console = Console(quiet=not accelerator.is_main_process, stderr=True)
        columns = [
            TextColumn("train"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("train", total=steps, completed=first, note="")
        self.sums: dict[str, Tensor] = {}
        self.count, self.history, self.warned = 0, list[dict[str, float]](), False

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint: history, and sums of the metrics since the last report."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "count": self.count, "history": self.history, "warned": self.warned}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint; nothing for an empty one."""
        if state:
            device = self.accelerator.device
            self.sums = {name: value.to(device) for name, value in state["sums"].items()}
            self.count, self.history, self.warned = state["count"], list(state["history"]), state["warned"]

    def __enter__(self) -> Reporter:
        self.bar.start()
        print_through(self.console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        print_through(None)
        self.bar.stop()

    def update(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Add an update's metrics; report after every `every` updates and after the last."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()  # on its device: no wait for a GPU
        self.count += 1
        if step % self.every == 0 or step == self.steps:
            self._report(step)
        self.bar.update(self.task, completed=step)

    def _report(self, step: int) -> None:
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        self.history.append(means)
        self.accelerator.log(means, step=step)
        note = "  ".join(f"{short} {means[name]:.4g}" for name, short in SHOWN.items() if name in means)
        self.bar.update(self.task, note=note)
        if not self.console.is_terminal:
            self.console.print(f"update {step}/{self.steps}  {note}", highlight=False, soft_wrap=True)
        self._warn(step, means)

    def _warn(self, step: int, means: Mapping[str, float]) -> None:
        """Warn once if a pair loss is saturated or has hardly moved.

        The first update says nothing, since every logit is 0. A loss that has hardly moved counts only in the second
        half of the run: before, the learning rate may still be warming up.
        """
        factor = means.get("gradient factor")
        if factor is None or self.warned or step == 1:
            return
        if factor < SATURATED:
            problem = "is saturated: beta is too large"
        elif unmoved(factor) and step >= self.steps // 2:
            problem = "has hardly moved: beta or the learning rate is too small"
        else:
            return
        self.warned = True
        logger.warning(f"warning: gradient factor {factor:.2g}, mean logit {means['logit']:.2g}: the loss {problem}")

    def verdict(self) -> str:
        """Return a sentence on the run's outcome, from the last tenth of its reports."""
        tail = self.history[-max(1, len(self.history) // 10) :]
        if not tail:
            return "nothing was trained"
        mean = {name: sum(h[name] for h in tail) / len(tail) for name in tail[-1]}
        sides = next((s for s in (("chosen", "rejected"), ("matched", "mismatched")) if f"{s[0]} gain" in mean), None)
        if sides is None:
            if "chosen error" not in mean:
                first, last = self.history[0]["loss"], mean["loss"]
                return f"loss {first:.4g} at the start, {last:.4g} at the end (on other pairs)"
            first, last = self.history[0]["chosen error"], mean["chosen error"]
            return f"chosen error {first:.4g} at the start, {last:.4g} at the end (on other noise)"
        noun = "images" if {f"{sides[0]} error", "clipped"} & mean.keys() else "responses"
        better, worse = (mean[f"{side} gain"] for side in sides)
        return preference_verdict(better, worse, mean["gradient factor"], noun, sides)


def unmoved(factor: float) -> bool:
    """Return whether a mean gradient factor sigma(-z) is near 1/2, its value for a policy equal to its reference."""
    return abs(factor - 0.5) < 0.5 - UNMOVED


def preference_verdict(
    chosen: float, rejected: float, factor: float, noun: str = "images", sides: tuple[str, str] = ("chosen", "rejected")
) -> str:
    """Return a sentence on a preference run's outcome.

    Args:
        chosen: mean gain of the policy over the reference on the chosen side, in score units.
        rejected: likewise for the rejected side.
        factor: the mean gradient factor sigma(-z).
        noun: "images" or "responses".
        sides: names of the two sides; images are "matched" with their own prompts and "mismatched" with others.
    """
    better, worse = sides
    numbers = f"({better} {chosen:+.2g}, {worse} {rejected:+.2g} against the reference; gradient factor {factor:.2f})"
    if unmoved(factor):
        return f"nothing moved {numbers}: train longer, or raise the learning rate"
    if chosen <= rejected:
        return f"the preference was not learned {numbers}"
    if chosen < 0:
        displaced = f"likelihood displacement; look at the {noun} before you use it"
        return f"both sides got worse, the {worse} one more {numbers}: {displaced}"
    if rejected > 0:
        return f"both sides improved, the {better} one more {numbers}"
    return f"{better} {noun} improved and {worse} ones got worse {numbers}"
