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

With `num_cached_draws: K` a pair has K draws of everything random (t, noise, posterior, dropped caption), epoch after
epoch in turn. What the reference scores under them is worked out once, before the training, and kept: two numbers a
draw. A step then costs the policy's run alone, and where all of the network learns no second one is in memory. Fewer
draws are another estimate of the same loss: a run of at most K epochs has the draws that it has without.

2B rows: the chosen images first, then the rejected.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field

from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step, cached_scores, reference_scores
from mmalign.methods._pair_loss import NumCachedDraws, PairLossConfig
from mmalign.methods.text_to_image._denoising import Contrast, denoising_scores, denoising_step, noise_pairs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

modality = "text_to_image"


class Config(PairLossConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; diffusers' SD script has half of it"
    )
    caption_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that lose their prompt")
    num_cached_draws: NumCachedDraws = 0


def requirements(cfg: Config) -> Requirements:
    """State what the method needs."""
    settings = {"caption_dropout": cfg.caption_dropout}
    return Requirements(precompute=cached_scores(cfg.num_cached_draws, settings))


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Any, rng: KeyedRNG) -> list[Contrast]:
    """One contrast: both images of every pair under the same noise."""
    view = noise_pairs(policy.family, batch, cfg.caption_dropout, rng)
    scores = reference_scores(policy, batch, partial(denoising_scores, policy.family, view=view))
    return [Contrast(view, scores, batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: PairLossConfig) -> Step:
    """The pair loss on the policy's and the reference's denoising scores."""
    assert contrast.reference is not None, "the method needs a reference"
    policy_scores = denoising_scores(policy.family, policy.model, contrast.view)
    return denoising_step(cfg, policy_scores, contrast.reference, contrast.weights)
