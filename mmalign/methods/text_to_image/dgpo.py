"""Direct group preference optimization (DGPO, arXiv:2510.08425): Diffusion-DPO of a whole group of images.

    images, advantages A, t and eps as in `_online`
    loss = softplus(beta mean_k A (error - reference error)) / beta

Two images with the advantages 1 and -1 make it Diffusion-DPO. An image whose error has changed far enough since its
generation, in the direction of its advantage, has no gradient (`clip`).

B prompts, K images of each; [KB] rows.
"""

from __future__ import annotations

from mmalign.config.methods.online_images import DGPOConfig as Config
from mmalign.families.base import TextToImage
from mmalign.losses.forward_process import dgpo, within_trust
from mmalign.methods import Step
from mmalign.methods.text_to_image._online import (
    Contrast,
    errors_of,
    online_contrasts,
    online_requirements,
    online_step,
)
from mmalign.policy import Policy

requirements = online_requirements
contrasts = online_contrasts


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the group's loss on the errors of policy and reference."""
    errors, advantage = errors_of(policy, contrast), contrast.advantages
    error = errors.policy
    if cfg.clip is not None:
        error = within_trust(error, errors.old, advantage, clip=cfg.clip)
    return online_step(dgpo(error, errors.reference, advantage, beta=cfg.beta), errors, contrast)
