"""Classifier-free guidance (arXiv:2207.12598): away from what the network says without a prompt."""

from __future__ import annotations

from torch import Tensor


def apply_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """`unconditional + scale * (conditional - unconditional)` of two predictions [N, C, H, W], in float32.

    A scale of 1 is the conditional prediction itself. Every parameterization of noise and image is linear, so it does
    not matter in which one the two are combined.
    """
    unconditional, conditional = unconditional.float(), conditional.float()
    return unconditional + scale * (conditional - unconditional)
