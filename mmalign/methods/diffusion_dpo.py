"""Diffusion-DPO (arXiv:2311.12908, eq. 14): noise both images alike, prefer the one that is denoised better.

    t ~ U{0, ..., T - 1},  eps ~ N(0, 1)                        one of each for both images of a pair
    x_t = add_noise(x_0, eps, t)
    score = -1/2 mean((target - network(x_t, t, prompt)) ** 2)   for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin))

The equation has a noise for each image and sums over pixels; the release (and the paper's pseudocode) shares the noise
and takes means, and so do we. Where the release reduces errors in half precision, we do in float32: its logits are off
by 0.1 to 2 for that reason alone.

In flow matching t is drawn as the family's schedule says, and the target is the velocity, as in Flow-GRPO's DPO. Its
errors have another unit, and so has beta: Flow-GRPO has 100 at Stable Diffusion 3.5-medium, and advises 2000 for FLUX.

With `cache_draws: K` a pair has K draws of everything random (t, noise, posterior, dropped caption), epoch after epoch
in turn. What the reference scores under them is worked out once, before the training, and kept: two numbers a draw. A
step then costs the policy's run alone, and where all of the network learns no second one is in memory. Fewer draws are
another estimate of the same loss: a run of at most K epochs has the draws that it has without.

2B rows: the chosen images first, then the rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmalign.diffusion.noise import mean_square
from mmalign.draws import Draws
from mmalign.encode import EncodedPairs
from mmalign.families import Conditioning, TextToImage
from mmalign.methods import Keep, Step, reference_scores
from mmalign.methods._pairs import CacheDraws, PairLossConfig, bound_loss, preference_step
from mmalign.policy import Policy, Scores

modality = "text_to_image"
needs_reference = True

PAIR = ("chosen", "rejected")


class Config(PairLossConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; diffusers' SD script has half of it"
    )
    caption_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that lose their prompt")
    cache_draws: CacheDraws = 0


@dataclass(frozen=True)
class Clean:
    """Both images of every pair before they are noised: x_0 [2B, C, H, W], the pair's t [2B], the conditioning [2B]."""

    x_0: Tensor
    t: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class Noised:
    """What the networks are shown: x_t [2B, C, H, W], t [2B], the conditioning [2B], and the right answer."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Conditioning

    def __getitem__(self, rows: slice) -> Noised:
        return Noised(self.x_t[rows], self.t[rows], self.target[rows], self.cond[rows])

    @classmethod
    def cat(cls, parts: Sequence[Noised]) -> Noised:
        """The rows of all parts."""
        x_t, t, target = (torch.cat([getattr(p, name) for p in parts]) for name in ("x_t", "t", "target"))
        return cls(x_t, t, target, Conditioning.cat([p.cond for p in parts]))


@dataclass(frozen=True)
class Contrast:
    """A noised pair, the reference's scores of it, and the weight of each pair [B]."""

    view: Noised
    reference: Scores | None
    weights: Tensor


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Any, draws: Draws) -> list[Contrast]:
    """One contrast: both images of every pair under the same noise."""
    view = noised(policy.family, batch, cfg.caption_dropout, draws)
    scores = reference_scores(policy, batch, partial(denoising_scores, policy.family, view=view))
    return [Contrast(view, scores, batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: PairLossConfig) -> Step:
    """The pair loss on the policy's and the reference's denoising scores."""
    assert contrast.reference is not None, "the method needs a reference"
    ours = denoising_scores(policy.family, policy.model, contrast.view)
    return denoising_step(cfg, ours, contrast.reference, contrast.weights)


def keeps(cfg: Any) -> Keep | None:
    """What the reference's scores depend on besides pairs, draws and reference; None where every draw is new."""
    return Keep(cfg.cache_draws, {"caption_dropout": cfg.caption_dropout}, scores=True) if cfg.cache_draws else None


def noised(
    family: TextToImage,
    batch: EncodedPairs,
    caption_dropout: float,
    draws: Draws,
    index: int = 0,
    t: Tensor | None = None,
) -> Noised:
    """Both images of every pair at one timestep and under one noise, with one decision about the caption.

    The timesteps [B] are drawn, if they are not given.
    """
    images, schedule = clean(family, batch, caption_dropout, draws, index, t), family.schedule
    x_0, t = images.x_0, images.t
    eps = draws.normal(batch.rows, tuple(x_0.shape[1:]), "noise", index).to(x_0.device).repeat(2, 1, 1, 1)
    return Noised(schedule.add_noise(x_0, eps, t), t, schedule.target(x_0, eps, t), images.cond)


def clean(
    family: TextToImage,
    batch: EncodedPairs,
    caption_dropout: float,
    draws: Draws,
    index: int = 0,
    t: Tensor | None = None,
) -> Clean:
    """Both images of every pair, sampled from their posteriors, with the pair's timestep and caption."""
    device = batch.latents.mean.device
    sampled = draws.normal(batch.rows, (2, *batch.latents.mean.shape[1:]), "posterior", index).to(device)
    x_0 = batch.latents.sample(sampled.transpose(0, 1).flatten(0, 1))
    drawn = family.schedule.draw_time(batch.rows, draws, index) if t is None else t
    cond = conditioned(family, batch, batch.text, caption_dropout, draws, index)
    return Clean(x_0, drawn.to(device).repeat(2), cond)


def conditioned(
    family: TextToImage, batch: EncodedPairs, text: Conditioning, caption_dropout: float, draws: Draws, index: int = 0
) -> Conditioning:
    """The conditioning [2B] of both images of every pair under `text` [B], dropped or not by one decision of the pair.

    Whatever the text, the same pairs are decided alike.
    """
    if caption_dropout > 0:
        keep = draws.uniform(batch.rows, (), "caption dropout", index).to(batch.weights.device) >= caption_dropout
        text = text.where(keep, batch.unconditional)
    return family.condition(text.repeat(2), batch.sizes)


def denoising_scores(family: TextToImage, net: nn.Module, view: Noised, views: Sequence[str] = PAIR) -> Scores:
    """`-1/2 mean(error ** 2)` [B] of the chosen and the rejected images, or of other `views`, one after the other."""
    error = mean_square(family.predict(net, view.x_t, view.t, view.cond), view.target)
    return dict(zip(views, (-0.5 * error).chunk(len(views)), strict=True))


def denoising_step(cfg: PairLossConfig, ours: Scores, theirs: Scores, weights: Tensor) -> Step:
    """The pair loss, with the errors that the scores are of."""
    errors = {f"{side} error": -2 * ours[side].detach() for side in PAIR}
    return preference_step(bound_loss(cfg), cfg.beta, ours, theirs, weights, errors)
