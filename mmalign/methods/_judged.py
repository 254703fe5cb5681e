"""Steps of methods that learn from single outputs with labels (thumbs), and from lists of outputs with scores.

B rows of at most K outputs. An unpaired method is one file: `requirements`, and the functions of `diffusion_kto` or
`kto`, with another loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.config.methods.kinds import ListMethodConfig, ThumbsMethodConfig
from mmalign.losses.groups import Group, order_accuracy, pick
from mmalign.methods import Memory, Requirements, Step
from mmalign.methods._pair_loss import bound_loss, preference_metrics

if TYPE_CHECKING:
    from mmalign.data.caches.precompute import PrecomputeSpec

OUTPUTS = "outputs"  # name of the scores of a row's outputs [B, K]
AVERAGE = "average gain"  # name of the average gain of earlier updates


@dataclass(frozen=True)
class Judged:
    """Scores of a batch's outputs.

    Attributes:
        policy: the policy's scores [B, K].
        reference: the reference's [B, K]; None for losses without a reference.
        scores: the data's labels or scores [B, K], NaN where a row has no output.
        weights: weights of the rows [B].
        more: further metrics of each output, [B, K] by name; "output error" and "output log-probability" are read by
            the verdict.
        lengths: tokens of each response [B, K]; None for images.
    """

    policy: Tensor
    reference: Tensor | None
    scores: Tensor
    weights: Tensor
    more: Mapping[str, Tensor]
    lengths: Tensor | None = None


def thumbs_requirements(cfg: ThumbsMethodConfig, precompute: PrecomputeSpec | None) -> Requirements:
    """Return the needs of a method that learns from thumbs: its baseline is a memory."""

    def remember(memory: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        updates = memory["updates"]
        average = cfg.loss.next_average(memory[AVERAGE], int(updates), metrics["output gain"])
        return {AVERAGE: average, "updates": updates + 1}

    return Requirements(
        learns_from="thumbs",
        liked_share=cfg.liked_share,
        precompute=precompute,
        memory=Memory({AVERAGE: 0.0, "updates": 0.0}, remember),
    )


def thumbs_step(cfg: ThumbsMethodConfig, memory: Mapping[str, float], judged: Judged) -> Step:
    """Return the step of an unpaired loss, [B] outputs.

    "accuracy" is the share of outputs on the side of the baseline that their label says; a tie is half right.
    """
    assert judged.reference is not None, "gains are over a reference"
    # A thumb is a list of one output
    gain, liked = (judged.policy - judged.reference)[:, 0], judged.scores[:, 0] > 0
    baseline = cfg.loss.baseline(memory[AVERAGE])
    losses = bound_loss(cfg.loss, cfg.beta)(gain, liked, baseline)
    losses = torch.where(liked, cfg.liked_weight, cfg.disliked_weight) * losses
    with torch.no_grad():
        # The logit in the direction of the label
        z = cfg.beta * (gain - baseline) * torch.where(liked, 1, -1)
        metrics = {"loss": losses.detach(), **preference_metrics(z), "output gain": gain.detach()}
        metrics |= {"liked": liked.to(gain.dtype), "baseline": torch.full_like(gain, baseline)}
        metrics |= {name: values[:, 0] for name, values in judged.more.items()}
    return Step(losses, judged.weights, metrics)


def list_step(cfg: ListMethodConfig, judged: Judged) -> Step:
    """Return the step of a group loss, [B] lists.

    The sides of the metrics are the best and the worst output. "accuracy" is the share of the outputs of different
    scores whose gains have the same order; a tie is half right.
    """
    # Rows of fewer outputs than K are padded with NaN
    present = ~judged.scores.isnan()
    rewards = judged.scores.nan_to_num().to(judged.policy.dtype)
    # Without a reference the gains are the scores themselves
    reference = torch.zeros_like(judged.policy) if judged.reference is None else judged.reference
    lengths = torch.ones_like(judged.policy) if judged.lengths is None else judged.lengths
    group = Group(judged.policy, reference, rewards, present, lengths)
    losses = bound_loss(cfg.loss, cfg.beta)(group)
    with torch.no_grad():
        sides, metrics = {"best": group.best, "worst": group.worst}, {"loss": losses.detach()}
        if judged.reference is not None:
            gains = {f"{side} gain": pick(group.gains, number) for side, number in sides.items()}
            metrics |= preference_metrics(cfg.beta * (gains["best gain"] - gains["worst gain"])) | gains
        metrics["accuracy"] = order_accuracy(group)
        for name, values in judged.more.items():
            metrics |= {name.replace("output", side): pick(values, number) for side, number in sides.items()}
    return Step(losses, judged.weights, metrics)
