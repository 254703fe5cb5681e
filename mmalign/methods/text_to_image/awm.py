"""Advantage-weighted matching (AWM, arXiv:2509.25050): training's own loss, weighted by how good an image is.

    images, advantages A, t and eps as in `_online`;  share = A / bound
    ratio = exp(measure(old error) - measure(error))
    loss = mean_k max(-share ratio, -share clamp(ratio, 1 - clip, 1 + clip))
           + trust |prediction - old|^2 + kl |prediction - reference|^2

The publication's trust region is around a moving average of the policy; here it is around the policy that generated
the images.

B prompts, K images of each; [KB] rows.
"""

from __future__ import annotations

from mmalign.config.methods.online_images import AWMConfig as Config
from mmalign.families.base import TextToImage
from mmalign.losses import forward_process
from mmalign.methods import Step
from mmalign.methods.text_to_image import _online
from mmalign.policy import Policy

requirements = _online.requirements
contrasts = _online.contrasts


def loss(policy: Policy[TextToImage], contrast: _online.Contrast, cfg: Config) -> Step:
    """Return the clipped loss of the measured errors, and the differences to the old policy and the reference."""
    errors, share = _online.errors_of(policy, contrast), contrast.advantages / cfg.advantages.clip
    # Noise levels [B, K] of the images' times, for the measure of errors
    noise = _online.by_prompt(policy.family.schedule.levels(contrast.view.t)[1].flatten(), len(share))
    new, old = (forward_process.measured(error, noise, cfg.measure) for error in (errors.policy, errors.old))
    losses = forward_process.awm(new, old, share, clip=cfg.clip)
    return _online.step(losses + (cfg.trust * errors.shift + cfg.kl * errors.drift).mean(1), errors, contrast)
