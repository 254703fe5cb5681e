"""Bound functions and logged metrics of methods with a pair loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import Tensor

from mmalign.config.losses import PairLossConfig
from mmalign.losses.pairwise import Pair, PairLoss
from mmalign.methods import Step
from mmalign.policy import Scores
from mmalign.registry import import_callable

SATURATED = 7.0  # size of a logit beyond which the loss has a thousandth of its first gradient, or twice of it


@cache  # one function for all batches of a run
def bound_loss(config: PairLossConfig, beta: float) -> PairLoss:
    """Return the function of a pair loss with its hyper-parameters bound."""
    function = import_callable("method.loss", config.function)
    return partial(function, beta=beta, **config.model_dump(exclude={"name"}))


def preference_step(
    link: PairLoss,
    beta: float,
    policy_scores: Scores,
    reference_scores: Scores,
    weights: Tensor,
    more: Mapping[str, Tensor],
) -> Step:
    """Return the step of a pair loss, with the common metrics and a method's own metrics `more`.

    "chosen gain" and "rejected gain" are policy score minus reference score, in score units. A run in which both fall
    is unlearning, even if its loss falls.
    """
    policy, reference = (
        Pair(policy_scores["chosen"], policy_scores["rejected"]),
        Pair(reference_scores["chosen"], reference_scores["rejected"]),
    )
    losses = link(policy, reference)
    with torch.no_grad():
        z = beta * (policy.margin - reference.margin)
        metrics = {
            "loss": losses.detach(),
            **preference_metrics(z),
            **more,
            "chosen gain": (policy.chosen - reference.chosen).detach(),
            "rejected gain": (policy.rejected - reference.rejected).detach(),
        }
    return Step(losses, weights, metrics)


def preference_metrics(z: Tensor) -> dict[str, Tensor]:
    """Return a comparison's metrics from its logits [B].

    They are accuracy (a tie is half right), the logit and its size, saturation, and the gradient factor.
    """
    return {
        "accuracy": (z > 0).float() + 0.5 * (z == 0).float(),
        "logit": z.detach(),
        "logit size": z.detach().abs(),
        "saturated": (z.abs() > SATURATED).float(),
        "gradient factor": torch.sigmoid(-z).detach(),
    }
