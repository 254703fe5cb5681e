"""Losses and logged metrics of methods with a pair loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from mmalign.config.losses import LossConfig, PairLossConfig
from mmalign.config.methods.kinds import PairMethodConfig
from mmalign.losses import wrappers
from mmalign.losses.pairwise import Pair, soft_preference
from mmalign.losses.wrappers import Labels
from mmalign.methods import Step
from mmalign.methods._pair_memory import noise_metrics, posteriors
from mmalign.policy import Scores
from mmalign.registry import import_callable

SATURATED = 7.0  # size of a logit beyond which the loss has a thousandth of its first gradient, or twice of it


@lru_cache(maxsize=64)  # one function for all batches of a run, unless it learns beta
def bound_loss(config: LossConfig, beta: float) -> Callable[..., Tensor]:
    """Return the function of a loss of pairs, thumbs or lists, with its hyper-parameters bound."""
    function = import_callable("method.loss", config.location)
    return partial(function, beta=beta, **config.arguments)


def pair_losses(cfg: PairMethodConfig, labels: Labels | None, policy: Pair, reference: Pair) -> Tensor:
    """Return the losses [B] of a batch's pairs, whose labels may be wrong if the method learns their rate."""
    if cfg.label_noise is not None:
        share, _ = posteriors(cfg, labels, _label_gap(cfg, policy, reference))
        # The preference becomes its posterior; margin and weight of a label stay
        sure = Labels(share, torch.zeros_like(share), torch.ones_like(share))
        labels = sure if labels is None else labels._replace(preference=share)
    return _summed(cfg, labels, policy, reference)


def view_losses(cfg: PairMethodConfig, labels: Labels | None, policy: Pair, reference: Pair) -> Tensor:
    """Return the losses [B] of other views than a pair's two sides: of its label they have the weight alone."""
    return _summed(cfg, labels.sure() if labels is not None else None, policy, reference)


def label_metrics(
    cfg: PairMethodConfig, labels: Labels | None, policy_scores: Scores, reference_scores: Scores | None
) -> dict[str, Tensor]:
    """Return the metrics of the labels' rates, each [B]; empty for a method that learns none."""
    if cfg.label_noise is None:
        return {}
    sides = pair_of(policy_scores, reference_scores)
    return noise_metrics(cfg, labels, posteriors(cfg, labels, _label_gap(cfg, *sides))[1])


@torch.no_grad()
def _label_gap(cfg: PairMethodConfig, policy: Pair, reference: Pair) -> Tensor:
    """Return the loss of the swapped pair minus that of the pair [B], without margins."""
    flipped = _summed(cfg, None, wrappers.swapped(policy), wrappers.swapped(reference))
    return flipped - _summed(cfg, None, policy, reference)


def _summed(cfg: PairMethodConfig, labels: Labels | None, policy: Pair, reference: Pair) -> Tensor:
    """Return the weighted sum [B] of a method's losses, as in MPO (arXiv:2411.10442), for labels that are right."""
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "js": wrappers.js,
        "forward_kl": wrappers.forward_kl,
        "alpha": partial(wrappers.alpha_divergence, coefficient=cfg.divergence_alpha),
    }
    if cfg.divergence != "reverse_kl":
        policy = wrappers.shaped(shapes[cfg.divergence], policy, reference)
        reference = wrappers.without_reference(policy)
    return torch.stack([t.weight * _one_loss(cfg, t.loss, labels, policy, reference) for t in cfg.terms]).sum(0)


def _one_loss(
    cfg: PairMethodConfig, loss: PairLossConfig, labels: Labels | None, policy: Pair, reference: Pair
) -> Tensor:
    """Return one loss of the sum [B], with the cap and the labels."""
    link = bound_loss(loss, cfg.beta)
    if not loss.reference:
        reference = wrappers.without_reference(policy)
    # A loss that reads the preference applies it: the labels must not do so again
    if labels is not None and loss.reads_preference:
        link = partial(link, preference=labels.preference)
        labels = labels._replace(preference=torch.ones_like(labels.preference))
    if cfg.logit_cap is not None:
        link = partial(wrappers.capped, link, cfg.logit_cap, cfg.beta)
    return link(policy, reference) if labels is None else wrappers.labelled(link, labels, cfg.beta, policy, reference)


def pair_of(
    policy_scores: Scores, reference_scores: Scores | None, chosen: str = "chosen", rejected: str = "rejected"
) -> tuple[Pair, Pair]:
    """Return the scores of two views under policy and reference; zeros without a reference."""
    policy = Pair(policy_scores[chosen], policy_scores[rejected])
    if reference_scores is None:
        return policy, wrappers.without_reference(policy)
    return policy, Pair(reference_scores[chosen], reference_scores[rejected])


def preference_step(
    losses: Tensor,
    beta: float,
    policy_scores: Scores,
    reference_scores: Scores | None,
    weights: Tensor,
    more: Mapping[str, Tensor],
) -> Step:
    """Return the step of a pair loss [B], with the common metrics and a method's own metrics `more`.

    "chosen gain" and "rejected gain" are policy score minus reference score, in score units. A run in which both fall
    is unlearning, even if its loss falls. Without a reference there is no gain, and no logit that begins at 0.
    """
    policy, reference = pair_of(policy_scores, reference_scores)
    with torch.no_grad():
        of_logit = preference_metrics(beta * (policy.margin - reference.margin))
        if reference_scores is None:
            return Step(losses, weights, {"loss": losses.detach(), "accuracy": of_logit["accuracy"], **more})
        metrics = {
            "loss": losses.detach(),
            **of_logit,
            **more,
            "chosen gain": (policy.chosen - reference.chosen).detach(),
            "rejected gain": (policy.rejected - reference.rejected).detach(),
        }
    return Step(losses, weights, metrics)


def with_own_loss(step: Step, name: str, weight: float, own_loss: Tensor, labels: Labels | None) -> Step:
    """Return a step with the chosen side's own loss [B] added, and logged by name; unchanged for a weight of 0."""
    if not weight:
        return step
    losses = step.losses + weight * own_loss * (labels.weight if labels is not None else 1.0)
    return replace(step, losses=losses, metrics={**step.metrics, name: own_loss.detach(), "loss": losses.detach()})


def soft_preference_step(scores: Pair, share: Tensor, factors: Tensor, weights: Tensor) -> Step:
    """Return the step of a judge's scores of pairs.

    Args:
        scores: the judge's logits [B] of both sides.
        share: the preference for the first side [B], 1/2 for a tie, of which no side is right.
        factors: factors of the losses [B]: the weights of the pairs' labels.
        weights: weights of the pairs [B].
    """
    losses, margin = factors * soft_preference(scores, share), scores.margin.detach()
    metrics = {"loss": losses.detach(), "accuracy": accuracy((2 * share - 1) * margin), "margin": margin}
    return Step(losses, weights, metrics)


def accuracy(z: Tensor) -> Tensor:
    """Return 1 where the margin [B] of the preferred side is positive, 1/2 where it is 0, and 0 elsewhere."""
    return (z > 0).float() + 0.5 * (z == 0).float()


def preference_metrics(z: Tensor) -> dict[str, Tensor]:
    """Return a comparison's metrics from its logits [B].

    They are accuracy, the logit and its size, saturation, and the gradient factor of `dpo`, whatever the loss.
    """
    return {
        "accuracy": accuracy(z),
        "logit": z.detach(),
        "logit size": z.detach().abs(),
        "saturated": (z.abs() > SATURATED).float(),
        "gradient factor": torch.sigmoid(-z).detach(),
    }
