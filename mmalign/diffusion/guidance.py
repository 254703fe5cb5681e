"""Classifier-free guidance (arXiv:2207.12598): extrapolation away from the prediction without a prompt."""

from __future__ import annotations

from torch import Tensor


def apply_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return `unconditional + scale * (conditional - unconditional)` of two predictions [N, C, H, W], in float32.

    A scale of 1 is the conditional prediction itself. Every parameterization is linear in noise and image, so guidance
    gives the same result in each.
    """
    unconditional, conditional = unconditional.float(), conditional.float()
    return unconditional + scale * (conditional - unconditional)
