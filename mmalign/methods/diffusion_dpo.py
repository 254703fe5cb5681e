"""Diffusion-DPO (arXiv:2311.12908, eq. 14): noise both images alike, prefer the one that is denoised better.

    t ~ U{0, ..., T - 1},  eps ~ N(0, 1)                        one of each for both images of a pair
    x_t = add_noise(x_0, eps, t)
    score = -1/2 mean((target - network(x_t, t, prompt)) ** 2)   for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin))

The equation has a noise for each image and sums over pixels; the release (and the paper's pseudocode) shares the noise
and takes means, and so do we. Where the release reduces errors in half precision, we do in float32: its logits are off
by 0.1 to 2 for that reason alone.

2B rows: the chosen images first, then the rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmalign.diffusion.noise import mean_square
from mmalign.draws import Draws
from mmalign.encode import EncodedPairs
from mmalign.families import Conditioning, TextToImage
from mmalign.losses import Pair, pair_loss
from mmalign.methods import Step
from mmalign.policy import Policy, Scores

needs_reference = True


class Config(BaseModel):
    """Hyper-parameters; the defaults are the release's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; diffusers' SD script has half of it"
    )
    loss: Literal["dpo", "ipo", "hinge", "robust"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="for loss: dpo")
    flip_rate: float = Field(0.0, ge=0, lt=0.5, description="for loss: robust")
    caption_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that lose their prompt")

    def bound_loss(self) -> Any:
        """The pair loss with the hyper-parameters that it has."""
        extra = {"dpo": {"label_smoothing": self.label_smoothing}, "robust": {"flip_rate": self.flip_rate}}
        return pair_loss(self.loss, beta=self.beta, **extra.get(self.loss, {}))


@dataclass(frozen=True)
class Noised:
    """What the networks are shown: x_t [2B, C, H, W], t [2B], the conditioning [2B], and the right answer."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class Contrast:
    """A noised pair, the reference's scores of it, and the weight of each pair [B]."""

    view: Noised
    reference: Scores | None
    weights: Tensor


def contrasts(policy: Policy, batch: EncodedPairs, cfg: Any, draws: Draws) -> list[Contrast]:
    """One contrast: both images of every pair under the same noise."""
    view = noised(policy.family, batch, cfg.caption_dropout, draws)
    scores = policy.on_reference(partial(denoising_scores, policy.family, view=view))
    return [Contrast(view, scores, batch.weights)]


def loss(policy: Policy, contrast: Contrast, cfg: Config) -> Step:
    """The pair loss on the policy's and the reference's denoising scores."""
    assert contrast.reference is not None, "diffusion_dpo needs a reference"
    ours = denoising_scores(policy.family, policy.model, contrast.view)
    return preference_step(cfg.bound_loss(), cfg.beta, ours, contrast.reference, contrast.weights)


def noised(family: TextToImage, batch: EncodedPairs, caption_dropout: float, draws: Draws, index: int = 0) -> Noised:
    """Both images of every pair at one timestep and under one noise, with one decision about the caption."""
    device = batch.latents.mean.device
    sampled = draws.normal(batch.rows, (2, *batch.latents.mean.shape[1:]), "posterior", index).to(device)
    x_0 = batch.latents.sample(sampled.transpose(0, 1).flatten(0, 1))
    t = family.schedule.draw_time(batch.rows, draws, index).to(device).repeat(2)
    eps = draws.normal(batch.rows, tuple(x_0.shape[1:]), "noise", index).to(device).repeat(2, 1, 1, 1)
    text = batch.text
    if caption_dropout > 0:
        keep = draws.uniform(batch.rows, (), "caption dropout", index).to(device) >= caption_dropout
        text = text.where(keep, batch.unconditional)
    schedule = family.schedule
    cond = family.condition(text.repeat(2), batch.sizes)
    return Noised(schedule.add_noise(x_0, eps, t), t, schedule.target(x_0, eps, t), cond)


def denoising_scores(family: TextToImage, net: nn.Module, view: Noised) -> Scores:
    """`-1/2 mean(error ** 2)` [B] of the chosen and the rejected images."""
    error = mean_square(family.predict(net, view.x_t, view.t, view.cond), view.target)
    chosen, rejected = (-0.5 * error).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def preference_step(link: Any, beta: float, ours: Scores, theirs: Scores, weights: Tensor) -> Step:
    """A pair loss with the numbers that a person watches.

    "chosen gain" and "rejected gain" are how much likelier than the reference the policy finds each side, in score
    units: a run in which both fall unlearns, whatever the loss says.
    """
    policy, reference = Pair(ours["chosen"], ours["rejected"]), Pair(theirs["chosen"], theirs["rejected"])
    losses = link(policy, reference)
    with torch.no_grad():
        margin = policy.margin - reference.margin
        z = beta * margin
        metrics = {
            "loss": losses.detach(),
            "accuracy": (z > 0).float() + 0.5 * (z == 0).float(),
            "logit": z.detach(),
            "gradient factor": torch.sigmoid(-z).detach(),
            "chosen error": -2 * policy.chosen.detach(),
            "rejected error": -2 * policy.rejected.detach(),
            "chosen gain": (policy.chosen - reference.chosen).detach(),
            "rejected gain": (policy.rejected - reference.rejected).detach(),
        }
    return Step(losses, weights, metrics)
