"""Response pairs of a recipe."""

from __future__ import annotations

from typing import Any

from mmalign.data.loaders.response_pairs import Wants


def _wants(method: Any, config: Any) -> Wants:
    """What a method asks for besides responses: its module says so."""
    pictures = hasattr(method, "needs_pictures") and method.needs_pictures(config)
    return Wants(pictures, getattr(method, "needs_others", False))
