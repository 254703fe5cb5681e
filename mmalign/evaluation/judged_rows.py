"""Scores of a data set's images by several judges, and properties of the images that a judge may reward.

K images of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from mmalign.console import tracked
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImagePair, SkippedRow, format_rows
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)

# From N images, their prompts and annotators, "" for none, to scores [N] by judge
Judges = Callable[[Sequence[Image.Image], Sequence[str], Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class JudgedRow:
    """Row of the data, by its number, with scores [K] by judge and values [K] by property."""

    number: int
    scores: Mapping[str, Sequence[float]]
    properties: Mapping[str, Sequence[float]]


def judge_rows(pairs: Sequence[ImagePair], judges: Judges, *, batch_size: int) -> list[JudgedRow]:
    """Score the images of all rows; rows with an unreadable image are left out and named in the log.

    The processes of a launch take the batches in turn, so that their number does not change a score.
    """
    processes, judged, bad = current_processes(), list[JudgedRow](), list[SkippedRow]()
    for index, start in enumerate(tracked(range(0, len(pairs), batch_size), "judge images")):
        if processes.is_mine(index):
            numbers = range(start, min(start + batch_size, len(pairs)))
            judged += _judge_batch({number: pairs[number] for number in numbers}, judges, bad)
    shares = processes.gather((judged, bad))
    skipped = [row for _, rows in shares for row in rows]
    if skipped:
        logger.warning(f"{len(skipped)} images cannot be read; their rows are left out: {format_rows(skipped)}")
    return sorted((row for rows, _ in shares for row in rows), key=lambda row: row.number)


def _judge_batch(pairs: Mapping[int, ImagePair], judges: Judges, bad: list[SkippedRow]) -> list[JudgedRow]:
    """Score the images of some rows; the reasons for skipped rows go to `bad`."""
    decoded = dict[int, list[Image.Image]]()
    for number, pair in pairs.items():
        try:
            decoded[number] = [decode(ref) for ref in pair.outputs]
        except BadImage as error:
            bad.append(error.skipped)
    if not decoded:
        return []
    # All images of all rows in one call
    images = [image for row in decoded.values() for image in row]
    of_images = [pairs[number] for number, row in decoded.items() for _ in row]
    prompts, annotators = [pair.prompt for pair in of_images], [pair.label.annotator for pair in of_images]
    scores = {name: values.tolist() for name, values in judges(images, prompts, annotators).items()}
    # Back to rows
    rows, start = list[JudgedRow](), 0
    for number, row in decoded.items():
        here = slice(start, start + len(row))
        sizes = [len(ref.read()) for ref in pairs[number].outputs]
        measured = [measure(image, size) for image, size in zip(row, sizes, strict=True)]
        properties = {name: [values[name] for values in measured] for name in measured[0]}
        rows.append(JudgedRow(number, {name: values[here] for name, values in scores.items()}, properties))
        start = here.stop
    return rows


def measure(image: Image.Image, num_bytes: int) -> dict[str, float]:
    """Return the properties of an RGB image that a judge may reward for their own sake.

    Brightness and contrast are mean and standard deviation of the luma, from 0 to 1. Colourfulness is that of Hasler
    and Suesstrunk (Human Vision and Electronic Imaging 2003), for channels from 0 to 1.
    """
    luma = np.asarray(image.convert("L"), dtype=np.float64) / 255
    red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float64) / 255, -1, 0)
    # Opponent colours: red against green, yellow against blue
    opponents = red - green, (red + green) / 2 - blue
    spread, center = (np.hypot(*(f(x) for x in opponents)) for f in (np.std, np.mean))
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "colourfulness": float(spread + 0.3 * center),
        "pixels": float(image.width * image.height),
        "file size": float(num_bytes),
    }
