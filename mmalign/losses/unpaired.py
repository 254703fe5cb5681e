"""Losses of single outputs with a label: pure functions of gains, one number per output.

N is the number of outputs, whose labels are `liked` [N]. A *gain* [N] is the policy's score minus the reference's, in
the units of `mmalign.losses.pairwise`. The logit is `z = beta * (gain - baseline)`. The *baseline* is an average gain
of earlier updates, so that the loss of an output does not depend on the other outputs of its batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto(gain: Tensor, liked: Tensor, baseline: float, *, beta: float) -> Tensor:
    """Return the loss of Kahneman-Tversky optimization (arXiv:2402.01306 eq. 8; Diffusion-KTO, arXiv:2404.04465).

    `sigma(-z)` if liked, else `sigma(z)`; the baseline is at least 0.
    """
    z = beta * (gain - baseline)
    return torch.sigmoid(torch.where(liked, -z, z))


def bco(gain: Tensor, liked: Tensor, baseline: float, *, beta: float) -> Tensor:
    """Return the loss of binary classifier optimization (arXiv:2404.04656 eq. 11).

    `-log sigma(z)` if liked, else `-log sigma(-z)`.
    """
    z = beta * (gain - baseline)
    return F.softplus(torch.where(liked, -z, z))


def apo_zero_unpaired(gain: Tensor, liked: Tensor, baseline: float, *, beta: float) -> Tensor:
    """Return the single-output loss of APO-zero (arXiv:2408.06266): that of `kto` with the baseline 0."""
    return kto(gain, liked, 0.0, beta=beta)
