"""Online DPO of denoisers, as in Flow-Factory and flow_grpo: the best against the worst of K generated images.

    x_0^1 ... x_0^K ~ policy(prompt);  chosen = the best by the judge, rejected = the worst
    loss = Diffusion-DPO's, or another pair loss, `noisings` times      (`diffusion_dpo`)

Only the chosen and the rejected image are noised, so an update costs as much as one on given pairs. The reference is
the model before training.

B prompts, K images of each; 2B rows: the chosen images first, then the rejected.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from mmalign.config.methods.online_images import DiffusionOnlineDPOConfig as Config
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements
from mmalign.methods._generated import parts
from mmalign.methods._pair_memory import pair_memory
from mmalign.methods.text_to_image import diffusion_dpo
from mmalign.methods.text_to_image._denoising import Contrast, denoising_scores
from mmalign.methods.text_to_image._online import generate, judged_requirements, noise_images
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts, a judge, and the reference of the loss."""
    return replace(judged_requirements(cfg, cfg.generation.noisings, 2), memory=pair_memory(cfg))


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate the images of a batch; return contrasts of the best and the worst, one noising after another."""
    generated, contrasts, family = generate(policy, batch, cfg.generation, rng), list[Contrast](), policy.family
    # The best and the worst image of each prompt [2, B, C, H, W]
    everyone = torch.arange(len(batch.rows), device=generated.rewards.device)
    ends = generated.latents[torch.stack([generated.rewards.argmax(1), generated.rewards.argmin(1)]), everyone]
    for index in range(cfg.generation.noisings):
        for part in parts(len(batch.rows), cfg.generation.prompts_per_contrast):
            view = noise_images(family, batch[part], ends[:, part], rng, index)
            scores = policy.on_reference(partial(denoising_scores, family, view=view))
            weights = generated.weights[part]
            contrasts.append(Contrast(view, scores, weights, summary=generated.summary))
    return contrasts


loss = diffusion_dpo.loss
