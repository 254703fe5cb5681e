"""Page of a run's samples: outputs of the base model and of the policy after some updates, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from mmalign.pages.page import data_uri, render

RELOAD_SECONDS = 30


@dataclass
class SampleHistory:
    """Outputs of a run so far, one for each prompt or question: texts, or images as data URIs.

    Attributes:
        settings: all that the outputs depend on besides the weights.
        base: outputs of the base model; empty if there is none.
        updates: outputs of the policy by the number of updates, in order.
    """

    settings: dict[str, object]
    base: list[str] = field(default_factory=list)
    updates: dict[int, list[str]] = field(default_factory=dict)


def encode_output(output: Image.Image | str) -> str:
    """Return an output as a history holds it."""
    return output if isinstance(output, str) else data_uri(output)


def decode_image(uri: str) -> Image.Image:
    """Return the image of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def render_samples(
    title: str,
    titles: Sequence[str],
    images: Sequence[Image.Image | None],
    history: SampleHistory,
    *,
    are_texts: bool,
    steps: int,
    is_over: bool,
) -> str:
    """Return the page of N prompts or questions, which reloads itself until the run is over.

    Args:
        title: the heading.
        titles: [N] the prompts or questions.
        images: [N] the images of questions or the sources of edits; empty for prompts alone.
        history: the outputs; the newest are shown first, beside the base model's.
        are_texts: true if the outputs are texts.
        steps: updates of the whole run.
        is_over: true if no more outputs follow.
    """
    # The base model first, then the newest updates
    columns = [("base", history.base)] if history.base else []
    columns += [(f"update {step:,}", outputs) for step, outputs in sorted(history.updates.items(), reverse=True)]
    shown = [None if image is None else data_uri(image) for image in images] or [None] * len(titles)
    rows = [
        {"title": name, "image": image, "cells": [(label, outputs[index]) for label, outputs in columns]}
        for index, (name, image) in enumerate(zip(titles, shown, strict=True))
    ]
    return render(
        "samples.html.jinja",
        title=title,
        rows=rows,
        are_texts=are_texts,
        done=max(history.updates, default=0),
        steps=steps,
        seconds=None if is_over else RELOAD_SECONDS,
    )
