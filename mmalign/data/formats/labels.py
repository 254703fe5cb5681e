"""Labels of pairs, in columns that rows of every layout of pairs may have.

preference  The probability that the chosen side is the better one, from 0 to 1.
margin      The size that the logit has to exceed.
weight      The factor of the pair's loss, at least 0.
annotator   A name, for noise rates of each.

The scores of a reward model give margins on request: `score_chosen, score_rejected`, in a layout of two numbered images
`score_0, score_1`, in rankings the scores or ranks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from mmalign.data.formats.files import Record, as_text, read_list, read_number, shorten
from mmalign.data.label import NO_LABEL, Label
from mmalign.data.pairs import UnusableRowError

Scales = Mapping[str, Sequence[float]]  # the lowest and the highest rating of each attribute
NO_RATINGS: Scales = MappingProxyType({})
SCORES = ("score_chosen", "score_rejected")
NUMBERED_SCORES = ("score_0", "score_1")  # in a layout of two numbered images
LARGEST = 1e6  # margin or weight
_RANGES = {"preference": (0.0, 1.0), "margin": (-LARGEST, LARGEST), "weight": (0.0, LARGEST)}


class Margins(NamedTuple):
    """Source of the margins.

    Attributes:
        kind: "column" for the column `margin`, "score" for differences of scores, "log_score" for their logarithms.
        scale: the factor of a difference, or of its logarithm.
    """

    kind: str = "column"
    scale: float = 1.0


COLUMN = Margins()


def read_label(
    fields: Collection[str], margins: Margins, record: Record, preference: float = 1.0, scores: Sequence[object] = ()
) -> Label:
    """Return the label of a pair.

    Args:
        fields: the fields of the label to read; the others have their defaults.
        margins: the source of the margins.
        record: the row, by the layout's own names.
        preference: the preference of a row without that column.
        scores: the chosen side's score and the rejected side's; empty takes the columns of scores.

    Raises:
        UnusableRowError: a value is not a number in its range, or a score is missing.
    """
    own = {name: record[name] for name in fields if name in record}
    scored = margins.kind != "column" and "margin" in fields
    if "preference" not in fields:
        preference = 1.0
    # Most rows have no label of their own, and share one object
    if not own and not scored and preference == 1:
        return NO_LABEL
    scores = scores or [record.get(name) for name in SCORES]
    margin = _margin(scores, margins) if scored else _number(own, "margin", 0.0)
    return Label(_number(own, "preference", preference), margin, _number(own, "weight", 1.0), _annotator(own))


def _annotator(record: Record) -> str:
    """Return the annotator's name; integers of a column with empty cells may come as floats."""
    value = record.get("annotator")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | None):
        raise UnusableRowError(f"annotator is {shorten(value)}; expected a name or a whole number")
    return as_text(value) if value is not None else ""


def read_ratings(scales: Scales, record: Record, images: Sequence[int], number: int) -> tuple[tuple[float, ...], ...]:
    """Return the ratings of some of a row's images, NaN where there is none; empty without scales.

    A column of the row has a list with a number for each of its images, perhaps None.

    Raises:
        UnusableRowError: a column is no list of so many numbers on its scale.
    """
    columns = list[list[float]]()
    for name, (low, high) in scales.items():
        values = read_list(name, record[name])
        if len(values) != number:
            raise UnusableRowError(f"{name} has {len(values)} ratings; expected one for each of {number} images")
        ratings = [math.nan if value is None else read_number(name, value) for value in values]
        if wrong := [value for value in ratings if not (low <= value <= high or math.isnan(value))]:
            raise UnusableRowError(f"{name} has the rating {wrong[0]:g}; expected numbers from {low:g} to {high:g}")
        columns.append(ratings)
    # By image, the ratings of all columns
    return tuple(tuple(ratings[n] for ratings in columns) for n in images) if columns else ()


def _number(record: Record, name: str, default: float) -> float:
    """Return the number in a column; an empty cell has the default."""
    value, (low, high) = record.get(name), _RANGES[name]
    if value is None or value == "":
        return default
    number = read_number(name, value)
    if not low <= number <= high:
        raise UnusableRowError(f"{name} is {shorten(value)}; expected a number from {low:,.0f} to {high:,.0f}")
    return number


def _margin(scores: Sequence[object], margins: Margins) -> float:
    """Return the margin of the scores of the chosen and the rejected side."""
    # Scores of the chosen and the rejected side, as a difference or its logarithm
    if any(score in (None, "") for score in scores):
        names = " and ".join(SCORES), " and ".join(NUMBERED_SCORES)
        raise UnusableRowError(f"has no scores, which data.margin: {margins.kind} takes from {' or '.join(names)}")
    chosen, rejected = map(read_number, ("the chosen score", "the rejected score"), scores)
    gap = chosen - rejected
    if margins.kind == "log_score":
        if gap <= 0:
            raise UnusableRowError(f"the chosen score exceeds the rejected one by {gap:g}; expected more than 0")
        gap = math.log(gap)
    # The limit is that of margins in a column
    margin = margins.scale * gap
    if not abs(margin) <= LARGEST:
        raise UnusableRowError(f"the margin of the scores is {margin:g}; expected at most {LARGEST:,.0f}")
    return margin
