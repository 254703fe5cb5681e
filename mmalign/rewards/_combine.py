"""Several judges as one.

J judges, N images. Images of one prompt are compared with one another; `zscore` and `vote` depend on a call's images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmalign.rewards import RewardModel

LEAST_SHARE = 0.01  # of votes; keeps the log-odds of a unanimous vote finite


@dataclass(frozen=True)
class Combined:
    """Judge whose scores combine those of other judges, on the CPU."""

    judges: Sequence[RewardModel]
    weights: Tensor  # [J]
    combine: Literal["sum", "zscore", "vote"]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32."""
        scores = torch.stack([judge(images, prompts, t).cpu().double() for judge in self.judges])
        return COMBINATIONS[self.combine](scores, self.weights.double(), prompts).float()


def weighted_sum(scores: Tensor, weights: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the weighted sum [N] of scores [J, N]."""
    return weights @ scores


def standard_scores(scores: Tensor, weights: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the weighted sum [N] of each judge's scores [J, N], centred and in units of its standard deviation.

    The deviation is the pooled one of images of one prompt, since only these are compared. A judge that tells none of
    them apart adds 0.
    """
    groups = list(_groups(prompts))
    squares = sum(
        ((scores[:, rows] - scores[:, rows].mean(1, keepdim=True)) ** 2).sum(1) for rows in groups
    ) + torch.zeros(len(scores), dtype=scores.dtype)
    deviation = (squares / max(len(prompts) - len(groups), 1)).sqrt()
    scale = torch.where(deviation > 0, weights / deviation, 0.0)
    return scale @ (scores - scores.mean(1, keepdim=True))


def votes(scores: Tensor, weights: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return half the log-odds [N] of an image's mean share of votes against the other images of its prompt.

    Each judge votes for the image with the higher score, and half for each of two equal ones. Between two images the
    difference of scores is the log-odds of the share of votes, which counts as at least 1 %, at most 99 %. An image
    alone has the score 0.
    """
    result = torch.zeros(len(prompts), dtype=scores.dtype)
    for rows in _groups(prompts):
        if len(rows) > 1:
            own = scores[:, rows]
            wins = ((own[:, :, None] - own[:, None]).sign() + 1) / 2  # [J, K, K]
            share = (weights[:, None] * (wins.sum(2) - 0.5)).sum(0) / (weights.sum() * (len(rows) - 1))
            result[rows] = share.clamp(LEAST_SHARE, 1 - LEAST_SHARE).logit() / 2
    return result


def _groups(prompts: Sequence[str]) -> Sequence[list[int]]:
    """Return the rows of each prompt."""
    rows = defaultdict[str, list[int]](list)
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    return list(rows.values())


COMBINATIONS: dict[str, Callable[[Tensor, Tensor, Sequence[str]], Tensor]] = {
    "sum": weighted_sum,
    "zscore": standard_scores,
    "vote": votes,
}
