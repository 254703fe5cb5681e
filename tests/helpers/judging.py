"""Judges that are functions."""

from collections.abc import Sequence

from PIL import Image


def letters(images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return a different score for almost every response."""
    return [float(sum(map(ord, response))) for response in responses]
