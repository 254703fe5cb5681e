"""Condition contrastive alignment (arXiv:2410.09347), on denoising: an image fits its own prompt, and no other's.

    t, eps, x_t of the chosen image, as in Diffusion-DPO;  c its prompt, c' another pair's;  both dropped together
    score(c) = -1/2 mean((target - network(x_t, t, c)) ** 2)   for policy and reference
    z(c) = beta * (policy's score - reference's score)
    loss = (softplus(-z(c)) + weight * softplus(z(c'))) / max(weight, 1);  where c' is c: softplus(-z(c')), of weight 1

The paper aligns autoregressive models, so that sampling without guidance matches sampling with it. Its scores are
log-probabilities of tokens. The denoising score is our substitute; no settings for it are published. The defaults are
reasoned, not searched:

* `weight: 1`. The release uses 50 to 1000 for the thousand classes of ImageNet. At the optimum z(c) is the log of
  p(x | c) / (weight * p(x)). A weight equal to the number of classes thus leaves known images as likely as before and
  makes all others unlikely. One noise at one time says little about a prompt, so p(x | c) / p(x) is near 1. A large
  weight would then reward denoising everything worse. At 1 matching prompts gain as much as the others lose.
* `beta: 2000`. At weight 1 the initial gradient equals that of a Diffusion-DPO between the two prompts, in the same
  unit. The published values there are 2000 to 5000. We use the lower one: z covers one side alone, so it includes
  gains that both sides share and saturates sooner.

Only the chosen images are used: one term makes every image likely, and no term would separate the rejected images from
the chosen.

c' is the prompt of the next pair of nonzero weight in the batch; the last pair gets the first one's prompt, as
released. Pairs of weight 0 are skipped. The reference's scores of c' depend on the batch, not only on the pair, so they
are never cached. If a pair is the only one of nonzero weight, or its neighbour has the same prompt, c' = c. Each
process rolls its own batch. Unlike in other methods, results therefore depend on the batch size and the number of
processes; resuming is exact. A batch size of 1 has no other prompts and is refused.

2B rows: the chosen images under their own prompts ("matched"), then the same images under the other prompts
("mismatched"). Accuracy is the share of images that gained more with their own prompt; a tie is one half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmalign.config.methods.text_to_image import CCAConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.families.types import Conditioning
from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import preference_metrics
from mmalign.methods.text_to_image._denoising import NoisedPairs, denoising_scores, noise_pairs, pair_conditioning
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

PROMPTS = ("matched", "mismatched")


@dataclass(frozen=True)
class Contrast:
    """The chosen images under two prompts each [2B], the reference's scores, a mask of equal prompts [B], and weights.

    The weights are those of the pairs [B].
    """

    view: NoisedPairs
    reference: Scores | None
    same_condition: Tensor
    weights: Tensor


def requirements(_: Config) -> Requirements:
    """Return the method's needs: at least two pairs per batch, and a reference."""
    return Requirements(min_pairs=2)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: every chosen image with its own prompt and, under the same noise, with its neighbour's."""
    family, number = policy.family, len(batch.rows)
    # The first B rows are the chosen images
    own = noise_pairs(family, batch, cfg.caption_dropout, rng)[:number]
    # Under the same noise another prompt; where a row's own is dropped, so is this one
    text = batch.text[neighbours(batch.weights)]
    other = replace(own, cond=pair_conditioning(family, batch, text, cfg.caption_dropout, rng)[:number])
    view = NoisedPairs.cat([own, other])
    scores = policy.on_reference(partial(denoising_scores, family, view=view, views=PROMPTS))
    return [Contrast(view, scores, is_same_condition(own.cond, other.cond), batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the loss that makes an image likely with its own prompt and unlikely with the other one."""
    reference_scores = contrast.reference
    assert reference_scores is not None, "cca needs a reference"
    policy_scores = denoising_scores(policy.family, policy.model, contrast.view, PROMPTS)
    sides, reference = (Pair(*(scores[name] for name in PROMPTS)) for scores in (policy_scores, reference_scores))
    values = pairwise.cca(sides, reference, contrast.same_condition, beta=cfg.beta, weight=cfg.weight)
    with torch.no_grad():
        metrics = {"loss": values.detach(), **preference_metrics(cfg.beta * (sides.margin - reference.margin))}
        for name in PROMPTS:
            metrics[f"{name} error"] = -2 * policy_scores[name].detach()
            metrics[f"{name} gain"] = policy_scores[name].detach() - reference_scores[name]
    return Step(values, contrast.weights, metrics)


def neighbours(weights: Tensor) -> Tensor:
    """Return the index [B] of the pair that lends each pair its other prompt.

    It is the next pair of nonzero weight; a pair of weight 0 gets its own index.
    """
    order = torch.arange(len(weights), device=weights.device)
    counted = order[weights > 0]
    order[counted] = counted.roll(-1)
    return order


def is_same_condition(first: Conditioning, second: Conditioning) -> Tensor:
    """Return a mask [N] of equal conditioning: equal prompts, prompts that are equal once cut, or both dropped."""
    same = [(x == second.tensors[name]).flatten(1).all(1) for name, x in first.tensors.items()]
    return torch.stack(same).all(0)
