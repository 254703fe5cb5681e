"""Turns of a conversation."""

from __future__ import annotations

from typing import NamedTuple


class Turn(NamedTuple):
    """One side's words in a conversation: who speaks ("user", "assistant", "system"), and what.

    `<image>` in the text is the place of an image.
    """

    role: str
    text: str
