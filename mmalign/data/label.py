"""Label of a pair."""

from __future__ import annotations

from typing import NamedTuple


class Label(NamedTuple):
    """Label of a pair.

    Attributes:
        preference: the probability that the chosen side is the better one.
        margin: the size that the logit has to exceed.
        weight: the factor of the pair's loss.
        annotator: the annotator's name, or "".
    """

    preference: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    annotator: str = ""


NO_LABEL = Label()
FIELDS = Label._fields


def with_label(content: tuple[str, ...], label: Label) -> tuple[str, ...]:
    """Return the texts that stand for a pair's content and its label."""
    return (*content, repr(tuple(label))) if label != NO_LABEL else content
