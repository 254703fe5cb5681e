"""Denoising scores of image pairs, shared by the methods that compare errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmalign.config.methods.kinds import DenoisingMethodConfig
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.noise import Schedule, mean_square
from mmalign.families.base import TextToImage
from mmalign.families.types import Conditioning
from mmalign.losses.wrappers import Labels
from mmalign.methods import Step
from mmalign.methods._pair_loss import label_metrics, pair_losses, pair_of, preference_step, with_own_loss
from mmalign.policy import Scores
from mmalign.rng import KeyedRNG

PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class CleanPairs:
    """Both images of every pair, without noise: x_0 [2B, C, H, W], the pair's t [2B], the conditioning [2B] or [B]."""

    x_0: Tensor
    t: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class NoisedPairs:
    """Inputs of the networks: x_t [2B, C, H, W], t [2B], the conditioning [2B]; and the training target.

    If both images of a pair have the conditioning of its prompt, that may have [B] rows.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Conditioning

    def __getitem__(self, rows: slice) -> NoisedPairs:
        return NoisedPairs(self.x_t[rows], self.t[rows], self.target[rows], self.cond[rows])

    @classmethod
    def cat(cls, parts: Sequence[NoisedPairs]) -> NoisedPairs:
        """Concatenate the rows of all parts."""
        x_t, t, target = (torch.cat([getattr(p, name) for p in parts]) for name in ("x_t", "t", "target"))
        return cls(x_t, t, target, Conditioning.cat([p.cond for p in parts]))


@dataclass(frozen=True)
class Contrast:
    """Noised pairs, the reference's scores of them, weights and labels of the pairs [B], and the step's summary."""

    view: NoisedPairs
    reference: Scores | None
    weights: Tensor
    labels: Labels | None = None
    summary: Mapping[str, Tensor] = field(default_factory=dict)


def noise_pairs(
    family: TextToImage,
    batch: EncodedPairs,
    caption_dropout: float,
    rng: KeyedRNG,
    index: int = 0,
    t: Tensor | None = None,
) -> NoisedPairs:
    """Add noise to both images of every pair, with one timestep, noise and caption-dropout decision per pair.

    Without `t` [B] the timesteps are drawn.
    """
    images = sample_clean_pairs(family, batch, caption_dropout, rng, index, t)
    return noise_clean(family.schedule, images, batch.rows, rng, index)


def noise_clean(
    schedule: Schedule, images: CleanPairs, rows: Sequence[int], rng: KeyedRNG, index: int = 0
) -> NoisedPairs:
    """Add noise to images of rows [B], the first of all rows first, with one noise per row."""
    x_0, t, number = images.x_0, images.t, len(images.x_0) // len(rows)
    # One noise for all images of a row: [B, C, H, W] -> [KB, C, H, W]
    eps = rng.normal(rows, tuple(x_0.shape[1:]), "noise", index).to(x_0.device).repeat(number, 1, 1, 1)
    return NoisedPairs(schedule.add_noise(x_0, eps, t), t, schedule.target(x_0, eps, t), images.cond)


def sample_clean_pairs(
    family: TextToImage,
    batch: EncodedPairs,
    caption_dropout: float,
    rng: KeyedRNG,
    index: int = 0,
    t: Tensor | None = None,
) -> CleanPairs:
    """Sample both images of every pair from their posteriors, with the pair's timestep and conditioning."""
    device, number = batch.latents.mean.device, len(batch.latents.mean) // len(batch.rows)
    x_0 = batch.latents.sample(_draw_posterior(batch, number, rng, index).to(device))
    timesteps = family.schedule.draw_time(batch.rows, rng, index) if t is None else t
    cond = pair_conditioning(family, batch, batch.text, caption_dropout, rng, index)
    return CleanPairs(x_0, timesteps.to(device).repeat(number), cond)


def _draw_posterior(batch: EncodedPairs, number: int, rng: KeyedRNG, index: int) -> Tensor:
    """Return normal numbers [KB, C, H, W], two images of a row at a time: K does not change those of an image."""
    shape = (2, *batch.latents.mean.shape[1:])
    names = ["posterior", *(f"posterior {first}" for first in range(2, number, 2))]
    drawn = torch.cat([rng.normal(batch.rows, shape, name, index) for name in names], 1)[:, :number]
    return drawn.transpose(0, 1).flatten(0, 1)


def pair_conditioning(
    family: TextToImage, batch: EncodedPairs, text: Conditioning, caption_dropout: float, rng: KeyedRNG, index: int = 0
) -> Conditioning:
    """Return the conditioning [2B] of both images of every pair under `text` [B], with caption dropout per pair.

    The dropped pairs do not depend on `text`.
    """
    if caption_dropout > 0:
        keep = rng.uniform(batch.rows, (), "caption dropout", index).to(batch.weights.device) >= caption_dropout
        text = text.where(keep, batch.unconditional)
    return family.condition(text.repeat(len(batch.sizes) // len(batch.rows)), batch.sizes)


def denoising_scores(family: TextToImage, net: nn.Module, view: NoisedPairs, views: Sequence[str] = PAIR) -> Scores:
    """Return `-1/2 mean(error ** 2)` [B] of each of `views`, whose rows follow one another."""
    error = mean_square(family.predict(net, view.x_t, view.t, view.cond.cycle(len(view.t))), view.target)
    return dict(zip(views, (-0.5 * error).chunk(len(views)), strict=True))


def denoising_step(cfg: DenoisingMethodConfig, policy_scores: Scores, contrast: Contrast) -> Step:
    """Return the step of the pair loss, plus the chosen images' own error; both sides' errors are metrics."""
    errors = {f"{side} error": -2 * policy_scores[side].detach() for side in PAIR}
    labels, reference_scores = contrast.labels, contrast.reference
    more = errors | label_metrics(cfg, labels, policy_scores, reference_scores)
    losses = pair_losses(cfg, labels, *pair_of(policy_scores, reference_scores))
    step = preference_step(losses, cfg.beta, policy_scores, reference_scores, contrast.weights, more)
    step = replace(step, summary=contrast.summary)
    return with_own_loss(step, "sft", cfg.sft + cfg.likelihood, -2 * policy_scores["chosen"], labels)
