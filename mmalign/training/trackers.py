"""Curves and samples of a run, in the forms that accelerate's trackers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmalign.training.record import options
from mmalign.training.verdict import SCORES, SIDES

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "mmalign"  # of the trackers; also TensorBoard's folder in a run's output
NAMED = ("wandb", "trackio")  # trackers whose runs take a name
SHOWING = ("tensorboard", *NAMED)  # trackers that show samples

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
                # gain = factor * (policy - reference)
                if f"{side} gain" in means:
                    lines[f"{side} reference"] = value - means[f"{side} gain"] / factor
        if lines:
            result[suffix.strip()] = lines
    return result


def log_curves(accelerator: Accelerator, means: Mapping[str, float], step: int, prefix: str = "") -> None:
    """Log the chosen and rejected curves beside the reference's: as one chart in TensorBoard, else as one group."""
    curves = {prefix + name: lines for name, lines in charts(means).items()}
    flat = {f"{name}/{line}": value for name, lines in curves.items() for line, value in lines.items()}
    for tracker in accelerator.trackers if curves else ():
        tracker.log(curves if tracker.name == "tensorboard" else flat, step=step)


def init_trackers(accelerator: Accelerator, name: str, recipe: Mapping[str, object]) -> None:
    """Start the trackers of a run of this name, with each value of the recipe by its key, such as train.lr."""
    given = {key: value for key, value in options(recipe) if value is not None}
    # Trackers take numbers and words
    config = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in given.items()}
    accelerator.init_trackers(PROJECT, config, {tracker: {"name": name} for tracker in NAMED})


def without_samples(accelerator: Accelerator) -> list[str]:
    """Return the names of the trackers that show no samples."""
    return [tracker.name for tracker in accelerator.trackers if tracker.name not in SHOWING]


def log_samples(
    accelerator: Accelerator,
    titles: Sequence[str],
    base: Sequence[Image.Image | str],
    policy: Sequence[Image.Image | str],
    step: int,
) -> None:
    """Log N outputs of the policy, each beside that of the base model, under its prompt or question.

    Args:
        accelerator: the accelerator, with its trackers.
        titles: [N] the prompts or questions.
        base: [N] outputs of the base model, all images or all texts; empty if there are none.
        policy: [N] outputs of the policy.
        step: updates of the policy.
    """
    columns = [base, policy] if base else [policy]
    for index, outputs in enumerate(zip(*columns, strict=True)):
        texts = [output for output in outputs if isinstance(output, str)]
        images = [output for output in outputs if not isinstance(output, str)]
        for tracker in accelerator.trackers:
            tag = f"samples/{index + 1}: {titles[index][:60]}"
            if texts:
                _log_texts(tracker, tag, titles[index], texts, step)
            else:
                _log_images(tracker, tag, titles[index], images, step)


def _log_images(tracker: Any, tag: str, title: str, outputs: Sequence[Image.Image], step: int) -> None:
    """Log the outputs, from left to right, as one image."""
    joined: NDArray[np.uint8] = np.concatenate([np.asarray(image) for image in outputs], axis=1)
    match tracker.name:
        case "tensorboard":
            tracker.log_images({tag: joined[None]}, step=step, dataformats="NHWC")
        case "wandb":
            tracker.log_images({tag: [joined]}, step=step)
        case "trackio":
            import trackio

            tracker.log({tag: trackio.Image(joined, caption=title)}, step=step)


def _log_texts(tracker: Any, tag: str, title: str, outputs: Sequence[str], step: int) -> None:
    """Log the question and the outputs, the policy's last."""
    names = ("base", "policy")[-len(outputs) :]
    text = "\n\n".join([title, *(f"**{name}**: {output}" for name, output in zip(names, outputs, strict=True))])
    match tracker.name:
        case "tensorboard":
            tracker.log({tag: text}, step=step)
        case "wandb":
            tracker.log_table(tag, columns=["question", *names], data=[[title, *outputs]], step=step)
        case "trackio":
            import trackio

            tracker.log({tag: trackio.Markdown(text)}, step=step)
