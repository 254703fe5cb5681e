"""Advantages of judged outputs: how much better each is than the others of its prompt.

B prompts with K outputs each, J judges. Rewards are higher when better. Outputs of a prompt whose rewards are all equal
have the advantage 0, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def informative(rewards: Tensor) -> Tensor:
    """Return a mask [B] of the prompts whose rewards [B, K] differ."""
    return rewards.amax(1) > rewards.amin(1)


def advantages(
    rewards: Tensor,
    *,
    scale: Scale = "group",
    unbiased: bool = False,
    clip: float | None = None,
    weights: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    eps: float = 1e-4,
) -> Tensor:
    """Return rewards [B, K] minus their prompt's mean, in units of a standard deviation (GRPO, arXiv:2402.03300).

    Args:
        rewards: the rewards.
        scale: the standard deviation: of the prompt's rewards (GRPO), of all rewards of the batch (Flow-GRPO,
            DiffusionNFT), or none (Dr. GRPO, arXiv:2503.20783). That of the batch depends on the batch's other prompts.
        unbiased: divide squares by their number less one, as TRL does; the releases for images divide by their number.
        clip: largest absolute advantage; None for no limit.
        weights: weights [B] of the prompts; those of weight 0, which fill a batch, are not in its standard deviation.
        total: the sum over all processes, whose batches have one standard deviation.
        eps: added to the standard deviation; the releases' value.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (rewards.std(1, correction=int(unbiased), keepdim=True) + eps)
    elif scale == "batch":
        counted = rewards if weights is None else rewards[weights > 0]
        centred = centred / (_deviation(counted, unbiased, total) + eps)
    # Rewards all alike give no advantage, in place of a rounding error divided by eps
    values = torch.where(informative(rewards)[:, None], centred, 0)
    return values if clip is None else values.clamp(-clip, clip)


def _deviation(rewards: Tensor, unbiased: bool, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the standard deviation of all processes' rewards; 0 without any."""
    number, reward = total(torch.stack([torch.ones_like(rewards).sum(), rewards.sum()])).unbind()
    squares = total((rewards - reward / number.clamp(min=1)).square().sum())
    return (squares / (number - int(unbiased)).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return rewards [B, K] minus the mean of the prompt's other rewards (RLOO, arXiv:2402.14740)."""
    number = rewards.shape[1]
    return advantages(rewards, scale="none") * (number / (number - 1))


def decoupled(rewards: Tensor, weights: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Return the weighted sum [B, K] of each judge's advantages within its prompts (GDPO, arXiv:2601.05242).

    The rewards [J, B, K] of judges with different units thus count alike; a judge that tells none of a prompt's outputs
    apart adds 0. GDPO's advantages are those of this sum with the scale of the batch. `weights` [J] are the judges'.
    """
    judged = [advantages(own, eps=eps) for own in rewards]
    return torch.einsum("jbk,j->bk", torch.stack(judged), weights.to(rewards.dtype))


def constrained(rewards: Tensor, kept: Tensor) -> Tensor:
    """Return rewards [B, K] in which outputs that break a constraint have their prompt's least (CGPO, 2409.20370).

    `kept` [B, K] is true for outputs that keep all constraints. A prompt without any such output teaches nothing.
    """
    return torch.where(kept, rewards, rewards.amin(1, keepdim=True))
