"""Policy gradients on tokens of responses and on steps of samplers, from advantages (arXiv:2402.03300, GRPO).

N responses of at most R tokens each; log-probabilities are [N, R] in nats, and `mask` is true for the tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["token", "sequence"]


def ratios(logps: Tensor, old: Tensor, mask: Tensor, importance: Importance = "token") -> Tensor:
    """Return the likelihood ratios [N, R] of the policy and the policy that generated the responses.

    "token" is each token's own (GRPO). "sequence" is the geometric mean over a response's tokens, equal for all of them
    (GSPO, arXiv:2507.18071).
    """
    log_ratio = (logps - old).where(mask, 0)
    if importance == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logps)
    return log_ratio.exp()


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return `-min(r A, clip(r, 1 - low, 1 + high) A)` (PPO, arXiv:1707.06347), for advantages of any shape that fits.

    A ratio has no gradient once it has left the range on the side that its advantage favours.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return a mask of the ratios without a gradient."""
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """Return `e^d - d - 1` [N, R] with `d = reference - logps`, at least 0; on policy its mean is the KL divergence."""
    d = reference - logps
    return d.exp() - d - 1
