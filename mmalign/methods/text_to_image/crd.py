"""Centred reward distillation (CRD, arXiv:2603.14128): gains of a group's images regressed on their rewards.

    images, advantages A, t and eps as in `_online`;  y = (1 + A / bound) / 2,  g = old error - error
    loss = mean_k (beta (g - mean g) - (y - mean y))^2 / beta
           + mean_k [least_kl + y (kl - least_kl)] |prediction - guided reference|^2

With two images it is CoPG's. The better an image, the closer the policy stays to the reference's guided prediction.

B prompts, K images of each; [KB] rows.
"""

from __future__ import annotations

from mmalign.config.methods.online_images import CRDConfig as Config
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.families.base import TextToImage
from mmalign.losses.forward_process import crd
from mmalign.methods import Step
from mmalign.methods.text_to_image import _online
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

requirements = _online.requirements


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[_online.Contrast]:
    """Generate and judge the images of a batch, and return their contrasts, one noising after another."""
    return _online.contrasts(policy, batch, cfg, rng, cfg.reference_guidance)


def loss(policy: Policy[TextToImage], contrast: _online.Contrast, cfg: Config) -> Step:
    """Return the regression's loss, and the difference to the guided reference."""
    errors, share = _online.errors_of(policy, contrast), contrast.advantages / cfg.advantages.clip
    kl = cfg.least_kl + (1 + share) / 2 * (cfg.kl - cfg.least_kl)
    losses = crd(errors.policy, errors.old, share, beta=cfg.beta) + (kl * errors.drift).mean(1)
    return _online.step(losses, errors, contrast)
