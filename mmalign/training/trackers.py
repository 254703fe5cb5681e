"""Curves and samples of a run, in the forms that accelerate's trackers show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmalign.training.record import options
from mmalign.training.verdict import SCORES, SIDES

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "mmalign"  # of the trackers; also TensorBoard's folder in a run's output
NAMED = ("wandb", "trackio")  # trackers whose runs take a name

Charts = dict[str, dict[str, float]]  # chart -> line -> value


def charts(means: Mapping[str, float]) -> Charts:
    """Return the lines of both sides, of policy and reference, by measure: "error" or "log-probability".

    The reference's value follows from the policy's and the gain, which is the difference of their scores. Methods
    without a reference have no gain, and no such line.
    """
    result = Charts()
    for suffix, factor in SCORES:
        lines = dict[str, float]()
        for side in (side for sides in SIDES for side in sides):
            if side + suffix in means:
                lines[side] = value = means[side + suffix]
                if f"{side} gain" in means:
                    lines[f"{side} reference"] = value - means[f"{side} gain"] / factor
        if lines:
            result[suffix.strip()] = lines
    return result


def log_curves(accelerator: Accelerator, means: Mapping[str, float], step: int, prefix: str = "") -> None:
    """Log the chosen and rejected curves beside the reference's: as one chart in TensorBoard, else as one group."""
    found = {prefix + name: lines for name, lines in charts(means).items()}
    flat = {f"{name}/{line}": value for name, lines in found.items() for line, value in lines.items()}
    for tracker in accelerator.trackers if found else ():
        tracker.log(found if tracker.name == "tensorboard" else flat, step=step)


def init_trackers(accelerator: Accelerator, name: str, recipe: Mapping[str, object]) -> None:
    """Start the trackers of a run of this name, with each value of the recipe by its key, such as train.lr."""
    given = {key: value for key, value in options(recipe) if value is not None}
    config = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in given.items()}
    accelerator.init_trackers(PROJECT, config, {tracker: {"name": name} for tracker in NAMED})
