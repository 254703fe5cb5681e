"""Response pairs of a recipe."""

from __future__ import annotations

from typing import Any

from mmalign.data.loaders.response_pairs import RequestedInputs


def _requested_inputs(method: Any, config: Any) -> RequestedInputs:
    """What a method asks for besides responses: its module says so."""
    decoded_images = hasattr(method, "needs_decoded_images") and method.needs_decoded_images(config)
    return RequestedInputs(decoded_images, getattr(method, "needs_other_images", False))
