"""Needs of methods with a pair loss, and numbers that they learn while they train: the rate of wrong labels, and beta.

Wrong labels (LCPO, arXiv:2509.24159): a label is right with probability `eta = 1 - rate`. With `s` the probability of
the label under the pair loss, `s = sigma(loss(swapped pair) - loss(pair))`, expectation and maximization alternate:

    q = eta s / (eta s + (1 - eta) (1 - s))          probability that the chosen side is the better one, no gradient
    loss = q loss(pair) + (1 - q) loss(swapped pair)
    rate <- (1 - speed) rate + speed (1 - mean of q)    after an update, over all processes

Beta (SimpleTuner's auto-beta): `beta = logit(1 - gradient_factor) / average |margin|`, at most the recipe's. At the
first updates margins are near 0, where the formula has no bound.

Both read what the update before left, so they lag by one update; in return no loss depends on its batch's company, and
a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mmalign.config.methods.kinds import PairMethodConfig
from mmalign.data.label import FIELDS
from mmalign.losses.wrappers import Labels
from mmalign.methods import Memory, Requirements, cached_scores
from mmalign.policy import Scores

C = TypeVar("C", bound=PairMethodConfig)
RATE, SIZE = "rate of wrong labels", "size of margins"
LEAST_RATE = 1e-4  # the largest is 1 minus it; at 0 and 1 the posterior is 0/0 where the model contradicts a label


def pair_memory(cfg: PairMethodConfig) -> Memory | None:
    """Return the memory of a pair loss; None if it learns nothing."""
    if cfg.label_noise is None and cfg.auto_beta is None:
        return None
    start = dict[str, float]()
    if cfg.label_noise is not None:
        start[RATE] = cfg.label_noise.start
        start |= {_rate_of(name): rate for name, rate in cfg.label_noise.annotators.items()}
    if cfg.auto_beta is not None:
        start[SIZE] = _logit(1 - cfg.auto_beta.gradient_factor) / cfg.beta  # where the formula gives the recipe's beta
    names = cfg.label_noise.annotators if cfg.label_noise is not None else ()
    return Memory(start, partial(_remember, cfg), partial(_describe, cfg), names)


def pair_requirements(
    cfg: PairMethodConfig,
    num_cached: int,
    settings: Mapping[str, str | int | float],
    *,
    reference: bool = False,
    compute: Callable[..., Scores] | None = None,
) -> Requirements:
    """Return the needs of a pair loss: labels, its memory, and the reference of the loss or its cached scores.

    Args:
        cfg: hyper-parameters.
        num_cached: number of draws whose reference scores are cached; 0 for none.
        settings: hyper-parameters that the cached scores depend on.
        reference: the method needs a reference even if its loss does not.
        compute: function of the cached scores, as in `PrecomputeSpec`.
    """
    reference = reference or cfg.uses_reference
    cached = cached_scores(num_cached if reference else 0, settings, compute)
    return Requirements(reference, FIELDS, memory=pair_memory(cfg), precompute=cached)


def present(cfg: C, memory: Mapping[str, float]) -> C:
    """Return the hyper-parameters with the rates and the beta that the memory holds."""
    changes = dict[str, object]()
    if cfg.label_noise is not None:
        names = cfg.label_noise.annotators
        rates = {"start": memory[RATE], "annotators": {name: memory[_rate_of(name)] for name in names}}
        changes["label_noise"] = cfg.label_noise.model_copy(update=rates)
    if cfg.auto_beta is not None:
        wished = _logit(1 - cfg.auto_beta.gradient_factor)
        changes["beta"] = min(cfg.beta, wished / max(memory[SIZE], 1e-30))
    return cfg.model_copy(update=changes) if changes else cfg


def posteriors(cfg: PairMethodConfig, labels: Labels | None, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability that the chosen side is the better one [B], and that its label is right [B].

    Args:
        cfg: hyper-parameters with `label_noise`.
        labels: the pairs' labels; the prior mixes their preferences with the rates of their annotators.
        gap: loss of the swapped pair minus loss of the pair [B].
    """
    assert cfg.label_noise is not None, "the method learns the rate of wrong labels"
    # Rates: the annotator's own, or that of all others
    rates = [cfg.label_noise.annotators.get(name, cfg.label_noise.start) for name in _annotators(labels, len(gap))]
    rate = torch.tensor(rates, dtype=gap.dtype, device=gap.device)
    eta = 1 - rate
    share = labels.preference.to(gap.dtype) if labels is not None else torch.ones_like(gap)
    # Probability that the chosen side is the better one, before the model is asked
    prior = eta * share + rate * (1 - share)
    # Probability that the label is right, by the model's agreement with it
    s = torch.sigmoid(gap)
    agree = share * s + (1 - share) * (1 - s)
    right = eta * agree / (eta * agree + rate * (1 - agree))
    return torch.sigmoid(torch.logit(prior) + gap), right


def noise_metrics(cfg: PairMethodConfig, labels: Labels | None, right: Tensor) -> dict[str, Tensor]:
    """Return the metrics that the memory of wrong labels reads, each [B]."""
    assert cfg.label_noise is not None, "the method learns the rate of wrong labels"
    metrics = {"label right": right}
    names = _annotators(labels, len(right))
    for name in cfg.label_noise.annotators:
        # The annotator's labels, and how far each of them is right
        own = torch.tensor([name == each for each in names], dtype=right.dtype, device=right.device)
        metrics |= {f"label right of {name}": own * right, f"labels of {name}": own}
    return metrics


def _annotators(labels: Labels | None, number: int) -> Sequence[str]:
    """Return the annotators' names of as many pairs; empty where none is named."""
    return labels.annotators if labels is not None and labels.annotators else [""] * number


def _remember(cfg: PairMethodConfig, memory: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the next numbers."""
    numbers = dict(memory)
    if cfg.label_noise is not None:
        names, speed = cfg.label_noise.annotators, cfg.label_noise.speed
        # Means over an update: how far an annotator's labels are right, and their share of all labels
        sums = {_rate_of(name): (metrics[f"label right of {name}"], metrics[f"labels of {name}"]) for name in names}
        # The remaining labels have the common rate
        others = metrics["label right"] - sum(right for right, _ in sums.values())
        sums[RATE] = (others, 1 - sum(share for _, share in sums.values()))
        for key, (right, share) in sums.items():
            # An update may have no label of an annotator
            if share > 1e-6:
                rate = (1 - speed) * memory[key] + speed * (1 - right / share)
                numbers[key] = min(max(rate, LEAST_RATE), 1 - LEAST_RATE)
    if cfg.auto_beta is not None:
        # A logit is beta times its margin
        decay, size = cfg.auto_beta.decay, metrics["logit size"] / present(cfg, memory).beta
        numbers[SIZE] = decay * memory[SIZE] + (1 - decay) * size
    return numbers


def _describe(cfg: PairMethodConfig, memory: Mapping[str, float]) -> str:
    """Return the learned rates and beta in words."""
    parts = list[str]()
    if cfg.label_noise is not None:
        rates = [f"{name} {memory[_rate_of(name)]:.1%}" for name in cfg.label_noise.annotators]
        parts.append(f"wrong labels: {', '.join([f'{memory[RATE]:.1%}', *rates])}")
    if cfg.auto_beta is not None:
        parts.append(f"beta: {present(cfg, memory).beta:.3g}")
    return "; ".join(parts)


def _rate_of(name: str) -> str:
    return f"{RATE} of {name}"


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
