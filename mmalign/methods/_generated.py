"""Parts of a batch and summaries of rewards, for methods that learn from outputs of the policy.

B prompts, K outputs of each; R prompts are no padding.
"""

from __future__ import annotations

import math

from torch import Tensor

from mmalign.losses.advantages import informative
from mmalign.methods import Contrasts


def parts(number: int, size: int | None) -> list[slice]:
    """Return the prompts of each contrast, at most `size` of a number of them in a batch; None for all."""
    step = size or number
    return [slice(first, first + step) for first in range(0, number, step)]


def count_contrasts(times: int, outputs: int, size: int | None, number: int, *, rows_per_pair: int = 2) -> Contrasts:
    """Return the contrasts of a batch of so many prompts.

    Args:
        times: contrasts in which each prompt is.
        outputs: outputs of each prompt in a contrast.
        size: prompts of a contrast at most; None for all.
        number: prompts of the batch.
        rows_per_pair: rows of the network for two outputs: 2, or 4 under guidance.
    """
    pairs = math.ceil(min(number, size or number) * outputs / 2)
    return Contrasts(times * len(parts(number, size)), pairs, rows_per_pair)


def summarize_rewards(rewards: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Return what the log says of rewards [B, K]: values [R] of the prompts in the mask [B]."""
    judged = rewards[real]
    return {
        "reward": judged.mean(1),
        "reward spread": judged.std(1),
        "equal rewards": (~informative(judged)).to(judged.dtype),
    }
