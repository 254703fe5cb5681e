"""Diffusion-DPO (arXiv:2311.12908, eq. 14): noise both images alike, prefer the one that is denoised better.

    t ~ U{0, ..., T - 1},  eps ~ N(0, 1)                        one of each for both images of a pair
    x_t = add_noise(x_0, eps, t)
    score = -1/2 mean((target - network(x_t, t, prompt)) ** 2)   for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin))

The equation has one noise per image and sums over pixels. The release and the paper's pseudocode share the noise and
take means, and so do we. The release reduces errors in half precision, which alone shifts its logits by 0.1 to 2. We
reduce them in float32.

In flow matching the family's schedule draws t and the target is the velocity, as in Flow-GRPO's DPO. Errors and beta
then have another unit: Flow-GRPO uses 100 for Stable Diffusion 3.5-medium and advises 2000 for FLUX.

With `num_cached_draws: K` a pair cycles through K draws of everything random (t, noise, posterior, dropped caption),
one per epoch. The reference's scores of a draw, two numbers, are precomputed before training and cached. An update then
runs the policy alone, and full fine-tuning needs no second network in memory. Fewer draws are another estimate of the
same loss; a run of at most K epochs has the same draws as without a cache.

2B rows: the chosen images first, then the rejected.
"""

from __future__ import annotations

from functools import partial

from mmalign.config.methods.kinds import DenoisingMethodConfig
from mmalign.config.methods.text_to_image import DiffusionDPOConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step, reference_scores
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.text_to_image._denoising import Contrast, denoising_scores, denoising_step, noise_pairs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the reference of the loss, or its cached scores."""
    return pair_requirements(cfg, cfg.num_cached_draws, {"caption_dropout": cfg.caption_dropout})


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: both images of every pair under the same noise."""
    view = noise_pairs(policy.family, batch, cfg.caption_dropout, rng)
    scores = reference_scores(policy, batch, partial(denoising_scores, policy.family, view=view))
    return [Contrast(view, scores, batch.weights, batch.labels)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: DenoisingMethodConfig) -> Step:
    """Return the pair loss on the denoising scores of policy and reference."""
    policy_scores = denoising_scores(policy.family, policy.model, contrast.view)
    return denoising_step(present(cfg, policy.memory), policy_scores, contrast)
