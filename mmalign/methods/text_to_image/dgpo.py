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
from mmalign.methods.text_to_image import _online
from mmalign.policy import Policy

requirements = _online.requirements
contrasts = _online.contrasts


def loss(policy: Policy[TextToImage], contrast: _online.Contrast, cfg: Config) -> Step:
    """Return the group's loss on the errors of policy and reference."""
    errors, advantage = _online.errors_of(policy, contrast), contrast.advantages
    error = errors.policy
    if cfg.clip is not None:
        error = within_trust(error, errors.old, advantage, clip=cfg.clip)
    return _online.step(dgpo(error, errors.reference, advantage, beta=cfg.beta), errors, contrast)
