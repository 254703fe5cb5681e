"""Pipelines of diffusers that edit a source image, and their use of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

SOURCE = "source"  # name of the source's latents [N, C, H, W] in a conditioning


class Editing(NamedTuple):
    """Use of a source image.

    Attributes:
        sources: "optional" if the pipeline also generates images from a prompt alone.
        in_text: True if the text encoder sees the source too.
    """

    sources: Literal["required", "optional"]
    in_text: bool


EDITORS = {
    "FluxKontextPipeline": Editing("optional", in_text=False),
    "QwenImageEditPipeline": Editing("required", in_text=True),
    "QwenImageEditPlusPipeline": Editing("required", in_text=True),
}


def not_editing(path: str, kind: str) -> str:
    """Return the error message for source images that a pipeline has no use for."""
    return (
        f"there are source images, and {path} is a {kind}, which generates images from a prompt alone; leave them out, "
        f"or use a model of {', '.join(EDITORS)}"
    )
