"""Condition contrastive alignment (arXiv:2410.09347), on denoising: an image fits its own prompt, and no other's.

    t, eps, x_t of the chosen image, as in Diffusion-DPO;  c its prompt, c' another pair's;  both dropped together
    score(c) = -1/2 mean((target - network(x_t, t, c)) ** 2)   for policy and reference
    z(c) = beta * (policy's score - reference's score)
    loss = (softplus(-z(c)) + weight * softplus(z(c'))) / max(weight, 1);  where c' is c: softplus(-z(c')), of weight 1

The paper aligns autoregressive models, so that they draw without guidance what they drew with it; its scores are
log-probabilities of tokens. With the denoising score in their place the method is ours, and nobody has published
settings for it. The defaults are reasoned, not searched:

* `weight: 1`. The release takes 50 to 1000 for the thousand classes of ImageNet. At its optimum z(c) is the log of
  p(x | c) / (weight * p(x)), so a weight as large as the number of classes leaves known images as likely as they were
  and makes all others unlikely. One noise at one time says little about a prompt, that ratio is near 1, and a large
  weight would be met by denoising everything worse. At 1 what fits gains as what does not loses.
* `beta: 2000`. At weight 1 the gradient at the start is that of a Diffusion-DPO between the two prompts, in the same
  unit, whose published values are 2000 to 5000. The lower: z is of one side alone here, so it also holds what both
  sides gain in common, and would be saturated sooner.

The images are the chosen ones. One term says of every image that it is likely, and nothing here would tell the rejected
ones, which somebody found worse, from the chosen.

c' is the prompt of the next pair of the batch that counts, and the last one's is the first's, as released: pairs of
weight 0 neither lend their prompt nor have a say in whose is next. The reference's scores of c' are those of a batch,
not of a pair, and nothing is kept of them. A pair that is alone in what counts, or whose
neighbour has the same prompt, has c' = c. Each process rolls its own batch, so that, unlike elsewhere, numbers depend
on the batch's size and the number of processes; resuming is exact. A batch size of 1 has no other prompts: refused.

2B rows: the chosen images under their own prompts, then the same images under the others'. "matched" is the first half,
"mismatched" the second; accuracy is how often an image has gained more with its own prompt (both the same: one half).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

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

modality = "text_to_image"

PROMPTS = ("matched", "mismatched")


class Config(BaseModel):
    """Hyper-parameters; there are none published for diffusion, and these are ours (see above)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["cca"] = "cca"
    beta: float = Field(2000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    weight: float = Field(1.0, ge=0, description="of unlearning another pair's prompt; lambda in the paper")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of images that lose both prompts; as released")


@dataclass(frozen=True)
class Contrast:
    """The chosen images under two prompts each, the reference's scores, where the prompts are alike, and weights."""

    view: NoisedPairs
    reference: Scores | None
    same_condition: Tensor
    weights: Tensor


def requirements(_: Config) -> Requirements:
    """State what the method needs."""
    return Requirements(min_pairs=2)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Any, rng: KeyedRNG) -> list[Contrast]:
    """One contrast: every chosen image with its own prompt, and under the same noise with its neighbour's."""
    family, number = policy.family, len(batch.rows)
    own = noise_pairs(family, batch, cfg.caption_dropout, rng)[:number]
    text = batch.text[neighbours(batch.weights)]
    other = replace(own, cond=pair_conditioning(family, batch, text, cfg.caption_dropout, rng)[:number])
    view = NoisedPairs.cat([own, other])
    scores = policy.on_reference(partial(denoising_scores, family, view=view, views=PROMPTS))
    return [Contrast(view, scores, is_same_condition(own.cond, other.cond), batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """The image is likely with its own prompt, and unlikely with the other one."""
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
    """Whose prompt is each pair's other one [B]: that of the next pair that counts; of pairs that do not, their own."""
    order = torch.arange(len(weights), device=weights.device)
    counted = order[weights > 0]
    order[counted] = counted.roll(-1)
    return order


def is_same_condition(first: Conditioning, second: Conditioning) -> Tensor:
    """Where the network is told the same [N]: equal prompts, or such as are equal once cut, or both dropped."""
    same = [(x == second.tensors[name]).flatten(1).all(1) for name, x in first.tensors.items()]
    return torch.stack(same).all(0)
