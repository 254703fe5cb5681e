"""Turns of a conversation."""

from __future__ import annotations

from typing import NamedTuple

IMAGE = "<image>"  # image placeholder in a turn's text


class Turn(NamedTuple):
    """One message of a conversation: the speaker's role ("user", "assistant", "system") and the text.

    `<image>` in the text marks the position of an image.
    """

    role: str
    text: str
