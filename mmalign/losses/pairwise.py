"""Preference losses: pure functions of scores, one number per pair.

B is the number of pairs. A *score* [B] is higher for what the model finds likelier; an *error* [B] is lower when
better. The unit of `beta` is one over the unit of the scores. mmalign's denoising score is `-0.5 * mean(error ** 2)`
over channels and pixels, so the `beta` of the Diffusion-DPO release (2000 to 5000) goes in as it is; the value that
diffusers' Stable Diffusion script calls beta is half of it, and one for summed errors is `beta / D` with D elements in
a latent. Token scores are summed log-probabilities in nats (averaged for `ipo`), with the usual `beta` of 0.1.

`z` is the logit everything turns on: beta times how much more the policy prefers the chosen side than the reference
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
        """How much better the chosen side scores, [B]."""
        return self.chosen - self.rejected


def dpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization, arXiv:2305.18290 eq. 7; on denoising scores Diffusion-DPO, arXiv:2311.12908.

    `-log sigma(z)`; `label_smoothing` is the assumed share of swapped labels (conservative DPO).

    Returns:
        The loss [B]; ln 2 where policy and reference agree.
    """
    z = beta * (policy.margin - reference.margin)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def ipo(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """Identity preference optimization, eq. 17 of arXiv:2310.12036: draws the margin to `1 / (2 beta)` and no further.

    It has a target in the unit of the scores, so a `beta` does not carry over from one kind of score to another.

    Returns:
        The loss [B].
    """
    return (policy.margin - reference.margin - 1 / (2 * beta)) ** 2


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Tensor:
    """The hinge of SLiC-HF and RSO (arXiv:2309.06657, eq. 10): no gradient once `z` exceeds one.

    Returns:
        The loss [B]; 1 where policy and reference agree.
    """
    return F.relu(1 - beta * (policy.margin - reference.margin))


def robust(policy: Pair, reference: Pair, *, beta: float, flip_rate: float) -> Tensor:
    """Robust DPO, eq. 12 of arXiv:2403.00409: unbiased when a share `flip_rate` of the labels is swapped.

    Unlike label smoothing it can fall below zero, without a bound.

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
    """Step-wise preference optimization, arXiv:2406.04314: DPO on clipped likelihood ratios.

    `-log sigma(z)` with `z = beta * (r_chosen - r_rejected)`, where r, the log-ratio of policy to reference, is clipped
    to `[log(1 - clip), log(1 + clip)]` on either side by itself: a side that has left this range has no gradient.

    Args:
        policy: log-probabilities of the steps, as means over a latent's elements; `beta` and `clip` are tied to that.
        reference: likewise.
        beta: 10 in the release.
        clip: how far a ratio may go from 1 (0.1 in the release).

    Returns:
        The loss [B]; ln 2 where policy and reference agree.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    chosen = (policy.chosen - reference.chosen).clamp(low, high)
    rejected = (policy.rejected - reference.rejected).clamp(low, high)
    return -F.logsigmoid(beta * (chosen - rejected))


def soft_preference(scores: Pair, share: Tensor) -> Tensor:
    """Cross-entropy of a judge's preference with a soft label, as PickScore and SPO's step-aware judge are trained.

    `-share log sigma(d) - (1 - share) log sigma(-d)` with `d = scores.margin`, less the entropy of a tie where `share`
    is 1/2, so that a tie which is seen as one costs nothing.

    Args:
        scores: the judge's logits [B] of the two images.
        share: how much the first side is preferred [B]: 1, or 1/2 for a tie.

    Returns:
        The loss [B]; ln 2 where a preferred image scores as the other one.
    """
    d = scores.margin
    entropy = torch.where(share == 0.5, math.log(2), 0.0)
    return -share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d) - entropy


def mapo(
    chosen_error: Tensor, rejected_error: Tensor, *, beta: float, snr: float = 0.5, num_timesteps: int = 1000
) -> Tensor:
    """Margin-aware preference optimization, arXiv:2406.06424: no reference model.

    `chosen_error + beta * softplus(-num_timesteps * (s(snr * chosen_error) - s(snr * rejected_error)))` with the
    bounded score `s(x) = x / (e^x - 1)`. The published `exp(x) - 1` cancels in float32 for small errors, and its
    gradient is nan for large ones; this form does neither. `snr` is the release's name for what is a constant.

    Args:
        chosen_error: mean squared denoising errors [B], float32, at least 0.
        rejected_error: likewise, of the rejected side.
        beta: the weight of the margin beside the chosen side's own error (0.1 in the release).
        snr: the factor inside `s`.
        num_timesteps: the factor of the margin, the length of the noise schedule.

    Returns:
        The loss [B].
    """
    z = num_timesteps * (_bounded(snr * chosen_error) - _bounded(snr * rejected_error))
    return chosen_error + beta * F.softplus(-z)


def cca(policy: Pair, reference: Pair, same_condition: Tensor, *, beta: float, weight: float) -> Tensor:
    """Condition contrastive alignment, arXiv:2410.09347: the same thing under its own condition, and under another's.

    `(softplus(-z_own) + weight * softplus(z_other)) / max(weight, 1)` with `z = beta * (policy - reference)` of each
    side by itself, so that what both have in common counts, too. Where the two conditions are the same there is nothing
    to unlearn, and the second term is `softplus(-z_other)`, of weight 1. The division is the release's; it keeps the
    size of an update from growing with `weight`.

    Args:
        policy: `chosen` is the score under the own condition, `rejected` that under the other one.
        reference: likewise.
        same_condition: whether the two conditions are the same [B], bool; so they are where both are dropped.
        beta: one over the unit of the scores (0.02 for log-probabilities of an image's tokens in the release).
        weight: of unlearning the other condition, the paper's lambda (50 to 1000 for a thousand classes).

    Returns:
        The loss [B]; `(1 + weight) / max(weight, 1) * ln 2` where policy and reference agree, 2 ln 2 at weight 1.
    """
    own, other = (beta * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True))
    second = torch.where(same_condition, F.softplus(-other), weight * F.softplus(other))
    return (F.softplus(-own) + second) / max(weight, 1.0)


def _bounded(x: Tensor) -> Tensor:
    """`x / (e^x - 1)` for x >= 0: 1 at 0, falling to 0, with exact values and gradients throughout."""
    # Below 0.3 the series is exact to 1e-13, and the quotient's gradient is a difference of two large numbers.
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240 - x**8 / 1209600
    large = x.clamp(min=0.3)
    return torch.where(x < 0.3, series, large * torch.exp(-large) / -torch.expm1(-large))


_PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo, "hinge": hinge, "robust": robust}


def pair_loss(name: str, **hyperparameters: Any) -> PairLoss:
    """The pair loss called `name` with its hyper-parameters bound: a function of (policy, reference).

    Raises:
        ValueError: no pair loss has that name.
    """
    if name not in _PAIR_LOSSES:
        raise ValueError(f"loss: no pair loss is called {name!r}; expected one of {', '.join(_PAIR_LOSSES)}")
    return partial(_PAIR_LOSSES[name], **hyperparameters)
