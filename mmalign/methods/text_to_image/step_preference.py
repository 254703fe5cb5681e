"""SPO's step-aware judge (arXiv:2406.04314): which of two images is preferred, seen through noise?

    t ~ U{0, ..., T - 1},  eps ~ N(0, 1)        one of each for both images of a pair; of flow matching t ~ U[0, 1)
    image = decode(x_0 predicted from add_noise(x_0, eps, t))    by a frozen model, under guidance
    score = judge(image, prompt, t)
    loss = -log softmax(scores)[chosen]                      of a tie the mean over both, less ln 2

SPO scores images at every time of a sampling trajectory, so the step judge trains at uniform times
(`Schedule.any_time`). Flow-matching networks train at times from another distribution.

Training starts from a reward model of clean images and updates both of its towers. The release resizes images on the
GPU, by bicubic interpolation without antialiasing; here they go through the judge's own preprocessing. The release also
divides a pair's weight by the number of pairs of its prompt; we do not.

For SDXL the release distrusts the labels of a data set of another model's images. With `reward` a reward model labels
the clean images, and a pair with a difference of probabilities of at most `tie_margin` is a tie.

2B rows: the chosen images first, then the rejected; S is the side of the judge's input image; L is the number of
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.config.methods.judges import StepPreferenceConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.step_judge import StepJudge
from mmalign.losses.pairwise import Pair
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import soft_preference_step
from mmalign.methods.text_to_image._denoising import noise_pairs
from mmalign.methods.text_to_image._images import Guided, decode_images, predict_guided
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Contrast:
    """Predicted images [2B, 3, S, S], times [2B], tokens [B, L], preference shares [B] of the chosen, weights [B].

    `factors` [B] multiply the losses: the weights of the pairs' labels.
    """

    pixels: Tensor
    t: Tensor
    ids: Tensor
    share: Tensor
    weights: Tensor
    factors: Tensor


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the autoencoder's decoder, no reference, and a labelling reward model."""
    labels = ("preference", "weight") if cfg.reward is None else ("weight",)
    return Requirements(reference=False, labels=labels, vae_decoder=True, reward=cfg.reward)


def contrasts(policy: Policy[StepJudge], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the frozen model's predictions of both images of every pair under the same noise."""
    family = policy.family
    images, t = predict_images(family, batch, cfg.guidance, rng)
    factors = torch.ones_like(batch.weights) if batch.labels is None else batch.labels.weight
    shares, tokens = _shares(family, batch, cfg), family.tokens(batch.prompts)
    return [Contrast(family.pixels(images), t, tokens, shares, batch.weights, factors)]


def predict_images(
    family: StepJudge, batch: EncodedPairs, guidance: float, rng: KeyedRNG, t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Predict images [2B, 3, H, W] from noisy ones and return them with their timesteps [2B].

    Without `t` [B] the times are drawn.
    """
    painter = family.denoiser
    t = painter.schedule.any_time(batch.rows, rng) if t is None else t
    view = noise_pairs(painter, batch, 0.0, rng, t=t)
    empty = None if guidance == 1 else painter.condition(batch.unconditional.repeat(2), batch.sizes)
    answer = predict_guided(painter, painter.network, view.x_t, view.t, Guided(guidance, view.cond, empty))
    clean = painter.schedule.to_clean(answer, view.x_t, view.t)
    return decode_images(painter, clean), painter.schedule.timestep(view.t)


def _shares(family: StepJudge, batch: EncodedPairs, cfg: Config) -> Tensor:
    """Return the preference share [B] of each pair's first image: 1, 0, or 1/2 for a tie."""
    if batch.reward_model is None:
        return torch.ones_like(batch.weights) if batch.labels is None else batch.labels.preference
    clean = to_pil(decode_images(family.denoiser, batch.latents.mean))
    chosen, rejected = batch.reward_model(clean, list(batch.prompts) * 2).to(batch.weights).chunk(2)
    # How much the probabilities of the two sides differ
    sure = torch.tanh((chosen - rejected).abs() / 2) > cfg.tie_margin
    return torch.where(sure, (chosen > rejected).float(), 0.5)


def loss(policy: Policy[StepJudge], contrast: Contrast, cfg: Config) -> Step:
    """Return the cross-entropy [B] of the judge's preference."""
    scores = Pair(*policy.family.score(policy.model, contrast.pixels, contrast.ids, contrast.t).chunk(2))
    return soft_preference_step(scores, contrast.share, contrast.factors, contrast.weights)
