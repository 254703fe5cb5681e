"""A judge of images by Bradley and Terry (Biometrika 39, 1952), as PickScore is trained (arXiv:2305.01569).

    s_i = exp(scale) cos(image_i, prompt)                    by a CLIP
    loss = -p log sigma(s_1 - s_2) - (1 - p) log sigma(s_2 - s_1)     of a tie less ln 2

p is the pair's `preference`, 1 without that column and 1/2 for a tie. The gradient is 0 where the judge's probability
is p. Lists have the loss of their ranking (Plackett, Applied Statistics 24, 1975; Luce, 1959):

    loss = sum_i log(1 + sum_j exp(s_j - s_i))               over all j of a smaller score

With two images it is the pair's loss. Images of equal scores are not compared.

Heads learn named attributes beside it, by squared errors as in HelpSteer2 (arXiv:2406.08673): `attribute_weight` times
the mean over a row's ratings of ((prediction - rating) / half the scale)^2.

With `model.annotators` s is the score of the pair's annotator, by PAL's mixture of prototypes (arXiv:2406.08469;
mmalign/rewards/_annotators.py). The loss is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.config.methods.judges import BradleyTerryConfig as Config
from mmalign.data.loaders.batches import JudgedImages
from mmalign.families.image_judge import ImageJudge
from mmalign.losses.groups import Group, order_accuracy, pick, plackett_luce
from mmalign.losses.pairwise import Pair
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import soft_preference_step
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Contrast:
    """The judge's inputs for KB images and B prompts, the places of B annotators, and the batch."""

    images: Tensor
    text: Tensor
    places: Tensor | None
    batch: JudgedImages


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: pairs with ties, or lists, and no reference."""
    if cfg.rows == "lists":
        return Requirements(reference=False, learns_from="lists")
    labels = ("preference", "weight", "annotator")  # the last one also for the audit's strata
    return Requirements(reference=False, labels=labels, ties=True)


def contrasts(policy: Policy[ImageJudge], batch: JudgedImages, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the rows with the judge's inputs."""
    family, mixture, places = policy.family, policy.family.network.annotators, None
    if mixture is not None:
        places = mixture.places(batch.labels.annotators if batch.labels is not None else [""] * len(batch.rows))
    return [Contrast(family.inputs(batch.images), family.text_inputs(batch.prompts), places, batch)]


def loss(policy: Policy[ImageJudge], contrast: Contrast, cfg: Config) -> Step:
    """Return the negative log-likelihood [B] of the rows' preferences."""
    batch = contrast.batch
    values = policy.family.judge(policy.model, contrast.images, contrast.text, contrast.places)
    values = values.view(-1, len(batch.rows), values.shape[1]).transpose(0, 1)  # [B, K, 1 + A]
    scores = values[..., 0]
    step = _ranking(scores, batch) if cfg.rows == "lists" else _preference(scores, batch)
    heads = policy.family.network.attributes
    if heads is None or batch.ratings is None:
        return step
    # The attributes' squared errors
    errors, rated = heads.losses(values[..., 1:], batch.ratings), ~batch.ratings.isnan()
    mean = errors.sum((1, 2)) / rated.sum((1, 2)).clamp(min=1)
    rms = (errors.sum(1) / rated.sum(1).clamp(min=1)).detach().sqrt()
    metrics = {f"error of {name}": own for name, own in zip(heads.scales, rms.T, strict=True)}
    losses = step.losses + cfg.attribute_weight * mean
    return Step(losses, step.weights, {**step.metrics, "loss": losses.detach(), **metrics})


def _preference(scores: Tensor, batch: JudgedImages) -> Step:
    """Return the step of pairs' scores [B, 2]."""
    pair, ones = Pair(scores[:, 0], scores[:, 1]), torch.ones_like(batch.weights)
    share, factors = (ones, ones) if batch.labels is None else (batch.labels.preference, batch.labels.weight)
    return soft_preference_step(pair, share, factors, batch.weights)


def _ranking(scores: Tensor, batch: JudgedImages) -> Step:
    """Return the step of lists' scores [B, K]; the margin is that of the best and the worst image."""
    present, zeros = ~batch.scores.isnan(), torch.zeros_like(scores)
    group = Group(scores, zeros, batch.scores.nan_to_num(), present, torch.ones_like(scores))
    losses, margin = plackett_luce(group, beta=1.0), pick(scores, group.best) - pick(scores, group.worst)
    metrics = {"loss": losses.detach(), "accuracy": order_accuracy(group).detach(), "margin": margin.detach()}
    return Step(losses, batch.weights, metrics)
