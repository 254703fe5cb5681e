"""Losses of generated and judged outputs on denoising errors: pure functions, one number per prompt.

B prompts with K outputs each, all noised alike. An *error* [B, K] is a mean over an output's elements of the squared
difference to the training target; lower is better. `old_error` is that of the policy that generated the outputs, and
`shift` [B, K] the mean squared difference between the predictions of both. `share` [B, K] is an advantage divided by
its bound, from -1 to 1. A pair loss of the best and the worst output is one more loss of this kind.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.losses import groups
from mmalign.losses.policy_gradient import clipped, is_clipped

LEAST_ERROR = 1e-10  # of AWM's root, whose slope at 0 has no bound


def nft(error: Tensor, old_error: Tensor, shift: Tensor, share: Tensor, *, beta: float) -> Tensor:
    """Return the loss of DiffusionNFT (arXiv:2509.16117) without its weighting, which is `awm` with a trust region.

    `mean_i [share_i (error_i - old_error_i) + (beta - share_i) shift_i]`. Multiplied by the bound of the advantages and
    the squared factor from an error to one of x_0, it is the published loss up to a constant.
    """
    return (share * (error - old_error) + (beta - share) * shift).mean(1)


def weighted_nft(error: Tensor, old_error: Tensor, share: Tensor, *, beta: float) -> Tensor:
    """Return the loss of DiffusionNFT (arXiv:2509.16117) as published: each error in units of its mean size.

    `mean_i [r_i |e+_i|^2 / w+_i + (1 - r_i) |e-_i|^2 / w-_i] / beta`, with `e+ = (1 - beta) e_old + beta e`,
    `e- = (1 + beta) e_old - beta e`, r = (1 + share) / 2, means over elements, and w the mean of |e|, without gradient.

    Args:
        error: the policy's errors of x_0, element by element [B, K, D].
        old_error: those of the policy that generated the outputs.
        share: advantages divided by their bound.
        beta: how far the two implicit policies lie from the old one.
    """
    positive = _over_size((1 - beta) * old_error + beta * error)
    negative = _over_size((1 + beta) * old_error - beta * error)
    return ((1 + share) / 2 * positive + (1 - share) / 2 * negative).mean(1) / beta


def awm(error: Tensor, old_error: Tensor, advantage: Tensor, *, clip: float | None = None) -> Tensor:
    """Return the loss of advantage-weighted matching (arXiv:2509.25050), PPO's on errors.

    `mean_i max(-A_i ratio_i, -A_i clamp(ratio_i, 1 - clip, 1 + clip))` with `ratio = exp(old_error - error)`. At a
    ratio of 1 its gradient is that of `mean_i A_i error_i`.
    """
    ratio = torch.exp(old_error - error)
    return (clipped(ratio, advantage, clip, clip) if clip is not None else -advantage * ratio).mean(1)


def measured(error: Tensor, noise: Tensor, measure: Literal["plain", "noise", "root"]) -> Tensor:
    """Return AWM's measure of an error: itself, times the level of the noise, or 4 times its fourth root times that.

    The root is the release's choice; it weighs small errors more. `noise` is broadcast to `error`.
    """
    match measure:
        case "plain":
            return error
        case "noise":
            return noise * error
        case "root":
            return 4 * noise * (error.clamp(min=LEAST_ERROR).pow(0.25) - math.pow(LEAST_ERROR, 0.25))


def dgpo(error: Tensor, reference_error: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """Return the loss of direct group preference optimization (DGPO, arXiv:2510.08425).

    `softplus(beta mean_i A_i (error_i - reference_error_i)) / beta`, whose gradient is the release's. Two outputs with
    the advantages 1 and -1 make it Diffusion-DPO over beta, with the same beta.
    """
    return F.softplus(beta * (advantage * (error - reference_error)).mean(1)) / beta


def within_trust(error: Tensor, old_error: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Return errors [B, K] without gradient where an output has moved enough in the direction of its advantage (DGPO).

    That is where `exp(old_error - error)` is above 1 + clip for a positive advantage, or below 1 - clip for a negative.
    """
    ratio = torch.exp(old_error - error.detach())
    return torch.where(is_clipped(ratio, advantage, clip, clip), error.detach(), error)


def crd(error: Tensor, old_error: Tensor, share: Tensor, *, beta: float) -> Tensor:
    """Return the loss of centred reward distillation (CRD, arXiv:2603.14128), a regression of gains on rewards.

    `mean_i (beta (g_i - mean g) - (y_i - mean y))^2 / beta` with `g = old_error - error` and y = (1 + share) / 2: the
    loss `copg` of lists over beta K. It was published times the bound of the advantages.
    """
    group = groups.Group(
        -error, -old_error, (1 + share) / 2, torch.ones_like(error, dtype=torch.bool), torch.ones_like(error)
    )
    return groups.copg(group, beta=beta) / (beta * error.shape[1])


def _over_size(error: Tensor) -> Tensor:
    """Return the mean squared error over the mean absolute one [B, K], from errors [B, K, D]."""
    return error.square().mean(2) / error.detach().abs().mean(2).clamp(min=1e-5)
