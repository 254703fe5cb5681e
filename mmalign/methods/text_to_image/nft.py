"""DiffusionNFT (arXiv:2509.16117): towards what better images have in common, and away from worse ones.

    images, advantages A, t and eps as in `_online`;  share = A / bound
    loss = mean_k [share (error - old error) + (beta - share) |prediction - old|^2] + kl |prediction - reference|^2

That is the published loss without its weighting, up to a factor and a constant. The publication predicts x_0, mixes the
old and the new prediction to a positive and a negative one, and divides each squared error by the mean absolute one;
`weighting: l1` does that. The old policy generates the images. It is the policy itself, or as published a lagging copy
(`old`).

B prompts, K images of each; [KB] rows.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmalign.config.methods.online_images import NFTConfig as Config
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.families.base import TextToImage
from mmalign.losses import forward_process
from mmalign.methods import Requirements, Step
from mmalign.methods.text_to_image import _online
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs, with its old policy."""
    return replace(_online.requirements(cfg), old=cfg.old)


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[_online.Contrast]:
    """Return contrasts of the images that the old policy generates."""
    with policy.as_old():
        return _online.contrasts(policy, batch, cfg, rng)


def loss(policy: Policy[TextToImage], contrast: _online.Contrast, cfg: Config) -> Step:
    """Return the loss of the errors of all images, and the difference to the reference."""
    errors, share = _online.errors_of(policy, contrast), contrast.advantages / cfg.advantages.clip
    if cfg.weighting == "l1":
        losses = forward_process.weighted_nft(*_clean_errors(policy.family, contrast, errors), share, beta=cfg.beta)
    else:
        losses = forward_process.nft(errors.policy, errors.old, errors.shift, share, beta=cfg.beta)
    return _online.step(losses + cfg.kl * errors.drift.mean(1), errors, contrast)


def _clean_errors(family: TextToImage, contrast: _online.Contrast, errors: _online.Errors) -> tuple[Tensor, Tensor]:
    """Return the errors of x_0 of the policy and of the old policy, element by element [B, K, D]."""
    view, number = contrast.view, len(contrast.weights)
    target, *predicted = (
        family.schedule.to_clean(answer.float(), view.x_t, view.t)
        for answer in (view.target, errors.prediction, errors.old_prediction)
    )
    new, old = (_online.by_prompt((clean - target).flatten(1), number) for clean in predicted)
    return new, old
