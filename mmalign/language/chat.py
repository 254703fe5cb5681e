"""Turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

IMAGE = "<image>"  # image placeholder in a turn's text


class Turn(NamedTuple):
    """One message of a conversation: the speaker's role ("user", "assistant", "system") and the text.

    `<image>` in the text marks the position of an image.
    """

    role: str
    text: str


def as_text(turns: Sequence[Turn]) -> str:
    """Return a conversation without image placeholders: the text of a single turn, or a line for each with its role."""
    texts = [turn.text.replace(IMAGE, "").strip() for turn in turns]
    return texts[0] if len(turns) == 1 else "\n".join(f"{t.role}: {text}" for t, text in zip(turns, texts, strict=True))
