"""Preference losses: pure functions of scores, one number per pair.

B is the number of pairs. A *score* [B] is higher for what the model finds likelier; an *error* [B] is lower when
better. The unit of `beta` is one over the unit of the scores.

* The denoising score is `-0.5 * mean(error ** 2)` over channels and pixels. It takes the `beta` of the Diffusion-DPO
  release (2000 to 5000) unchanged. The beta of diffusers' Stable Diffusion script is half of it. For summed errors it
  is `beta / D`, with D elements in a latent.
* Token scores are summed log-probabilities in nats (means for `ipo`), with the usual `beta` of 0.1.

The logit is `z = beta * (policy.margin - reference.margin)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Callable[["Pair", "Pair"], Tensor]


class Pair(NamedTuple):
    """The scores [B] of the chosen and of the rejected side, float32; higher is better."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """Score of the chosen side minus score of the rejected side, [B]."""
        return self.chosen - self.rejected


def dpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of direct preference optimization, `-log sigma(z)` (arXiv:2305.18290 eq. 7).

    On denoising scores it is Diffusion-DPO (arXiv:2311.12908). `label_smoothing` is the assumed share of swapped labels
    (conservative DPO).

    Returns:
        The loss [B]; ln 2 where policy and reference agree.
    """
    z = beta * (policy.margin - reference.margin)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def ipo(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the loss of identity preference optimization (arXiv:2310.12036 eq. 17), with target margin `1 / (2 beta)`.

    The target is in the unit of the scores, so a `beta` for one kind of score does not suit another.

    Returns:
        The loss [B].
    """
    return (policy.margin - reference.margin - 1 / (2 * beta)) ** 2


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Return the hinge loss of SLiC-HF and RSO (arXiv:2309.06657, eq. 10), without gradient once `z` exceeds one.

    Returns:
        The loss [B]; 1 where policy and reference agree.
    """
    return F.relu(1 - beta * (policy.margin - reference.margin))


def robust(policy: Pair, reference: Pair, *, beta: float, flip_rate: float) -> Tensor:
    """Return the loss of robust DPO (arXiv:2403.00409 eq. 12), unbiased if a share `flip_rate` of labels is swapped.

    Unlike label smoothing, the loss is unbounded below.

    Returns:
        The loss [B].

    Raises:
        ValueError: `flip_rate` is not in [0, 0.5).
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"robust: flip_rate is {flip_rate}; expected at least 0 and less than 0.5")
    z = beta * (policy.margin - reference.margin)
    return (-(1 - flip_rate) * F.logsigmoid(z) + flip_rate * F.logsigmoid(-z)) / (1 - 2 * flip_rate)


def clipped_dpo(policy: Pair, reference: Pair, *, beta: float, clip: float) -> Tensor:
    """Return the loss of step-by-step preference optimization (arXiv:2406.04314), DPO on clipped likelihood ratios.

    The loss is `-log sigma(z)` with `z = beta * (r_chosen - r_rejected)`. r is the log-ratio of policy to reference,
    clipped to `[log(1 - clip), log(1 + clip)]` for each side separately. A side outside this range has no gradient.

    Args:
        policy: log-probabilities of the steps, as means over a latent's elements; `beta` and `clip` refer to means.
        reference: likewise, of the reference.
        beta: 10 in the release.
        clip: the largest distance of a ratio from 1 (0.1 in the release).

    Returns:
        The loss [B]; ln 2 where policy and reference agree.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    chosen = (policy.chosen - reference.chosen).clamp(low, high)
    rejected = (policy.rejected - reference.rejected).clamp(low, high)
    return -F.logsigmoid(beta * (chosen - rejected))


def soft_preference(scores: Pair, share: Tensor) -> Tensor:
    """Return the cross-entropy of a reward model's preference with a soft label, as in PickScore and SPO's step judge.

    The loss is `-share log sigma(d) - (1 - share) log sigma(-d)` with `d = scores.margin`. For a `share` of 1/2 the
    entropy of a tie is subtracted, so a tie with equal scores costs nothing.

    Args:
        scores: the reward model's logits [B] of the two images.
        share: the preference for the first side [B]: 1 or 0, or 1/2 for a tie.

    Returns:
        The loss [B]; ln 2 where a preferred image and the other one have equal scores.
    """
    d = scores.margin
    entropy = torch.where(share == 0.5, math.log(2), 0.0)
    return -share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d) - entropy


def mapo(
    chosen_error: Tensor, rejected_error: Tensor, *, beta: float, snr: float = 0.5, num_timesteps: int = 1000
) -> Tensor:
    """Return the loss of margin-aware preference optimization (arXiv:2406.06424), without a reference model.

    The loss is `chosen_error + beta * softplus(-num_timesteps * (s(snr * chosen_error) - s(snr * rejected_error)))`
    with the bounded score `s(x) = x / (e^x - 1)`. The published `exp(x) - 1` cancels in float32 for small errors and
    has a nan gradient for large ones. This form is numerically stable.

    Args:
        chosen_error: mean squared denoising errors [B], float32, at least 0.
        rejected_error: likewise, of the rejected side.
        beta: the weight of the margin relative to the chosen side's error (0.1 in the release).
        snr: the factor inside `s`, a constant despite the release's name.
        num_timesteps: the factor of the margin: the length of the noise schedule.

    Returns:
        The loss [B].
    """
    z = num_timesteps * (_bounded(snr * chosen_error) - _bounded(snr * rejected_error))
    return chosen_error + beta * F.softplus(-z)


def cca(policy: Pair, reference: Pair, same_condition: Tensor, *, beta: float, weight: float) -> Tensor:
    """Return the loss of condition contrastive alignment (arXiv:2410.09347), which contrasts two conditions of an item.

    The loss is `(softplus(-z_own) + weight * softplus(z_other)) / max(weight, 1)`. Each side has its own
    `z = beta * (policy - reference)`, so gains that both sides share also affect the loss. If both conditions are the
    same there is nothing to unlearn, and the second term is `softplus(-z_other)` with weight 1. The division is the
    release's; it prevents updates from growing with `weight`.

    Args:
        policy: scores; `chosen` under the own condition, `rejected` under the other one.
        reference: likewise, of the reference.
        same_condition: a mask of equal conditions [B], bool; true also where both are dropped.
        beta: one over the unit of the scores (0.02 for log-probabilities of an image's tokens in the release).
        weight: the weight of unlearning the other condition, the paper's lambda (50 to 1000 for a thousand classes).

    Returns:
        The loss [B]; `(1 + weight) / max(weight, 1) * ln 2` where policy and reference agree, 2 ln 2 at weight 1.
    """
    own, other = (beta * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True))
    second = torch.where(same_condition, F.softplus(-other), weight * F.softplus(other))
    return (F.softplus(-own) + second) / max(weight, 1.0)


def _bounded(x: Tensor) -> Tensor:
    """Return `x / (e^x - 1)` for x >= 0, falling from 1 at x = 0 to 0, with exact values and gradients."""
    # Below 0.3 the series is exact to 1e-13, while the quotient's gradient is a difference of two large numbers.
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240 - x**8 / 1209600
    large = x.clamp(min=0.3)
    return torch.where(x < 0.3, series, large * torch.exp(-large) / -torch.expm1(-large))
