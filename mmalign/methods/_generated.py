"""Parts of a batch and summaries of rewards, for methods that learn from outputs of the policy.

B prompts, K outputs of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.losses.advantages import informative
from mmalign.methods import Contrasts, Step


def parts(number: int, size: int | None) -> list[slice]:
    """Return the prompts of each contrast, at most `size` of a number of them in a batch; None for all."""
    step = size or number
    return [slice(first, first + step) for first in range(0, number, step)]


def count_contrasts(times: int, outputs: int, size: int | None, number: int) -> Contrasts:
    """Return the contrasts of a batch of so many prompts.

    Args:
        times: contrasts in which each prompt is.
        outputs: outputs of each prompt in a contrast.
        size: prompts of a contrast at most; None for all.
        number: prompts of the batch.
    """
    return Contrasts(times * len(parts(number, size)), math.ceil(min(number, size or number) * outputs / 2))


def summarize_rewards(rewards: Tensor, real: Tensor) -> dict[str, float]:
    """Return means of rewards [B, K] for the log, over the prompts in the mask [B]; 0 without any."""
    judged = rewards[real]
    means = {"reward": judged, "reward spread": judged.std(1), "equal rewards": (~informative(judged)).float()}
    return {name: float(values.mean().nan_to_num()) for name, values in means.items()}


def with_summary(step: Step, summary: Mapping[str, float]) -> Step:
    """Return a step with the means of its batch's generation among its metrics."""
    return replace(step, metrics=step.metrics | {name: torch.full_like(step.losses, x) for name, x in summary.items()})
