"""MaPO (arXiv:2406.06424): denoise the chosen image well, and better than the rejected one; no reference model.

    t, eps shared in the pair, as in Diffusion-DPO
    error = mean((target - network(x_t, t, prompt)) ** 2)
    loss = error_chosen + beta * softplus(-T * (s(snr * error_chosen) - s(snr * error_rejected)))
    s(x) = x / (e^x - 1)

For small errors s(x) = 1 - x / 2. The second term is then a Diffusion-DPO without reference, with a beta of T * snr
(500 at the release's values), weighted by `beta`.

`snr` scales errors of epsilon. Flow matching has errors of the velocity, which are larger: for the same prediction
|eps error|^2 = (1 - t)^2 |v error|^2. We multiply snr by E[(1 - t)^2] over training times, so that the margin is as
steep as the release's on average. 0.5 becomes 0.147 for logit-normal times, and 0.057 for times shifted by 3 (Stable
Diffusion 3). There T * snr is 57, of the order of Flow-GRPO's beta of 100. This is our derivation; no value is
published. Errors of DDPM's velocity use 0.5, as in the release.
"""

from __future__ import annotations

import torch

from mmalign.config.methods.text_to_image import MaPOConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Schedule
from mmalign.families.base import TextToImage
from mmalign.losses import pairwise
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import accuracy
from mmalign.methods.text_to_image._denoising import Contrast, denoising_scores, noise_pairs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

SNR = 0.5  # the release's


def requirements(_: Config) -> Requirements:
    """Return the method's needs: no reference."""
    return Requirements(reference=False)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return Diffusion-DPO's contrast without reference scores."""
    return [Contrast(noise_pairs(policy.family, batch, cfg.caption_dropout, rng), None, batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the chosen image's error plus the weighted loss of the margin between bounded scores."""
    scores = denoising_scores(policy.family, policy.model, contrast.view)
    # A score is -1/2 of the error
    chosen, rejected = -2 * scores["chosen"], -2 * scores["rejected"]
    schedule = policy.family.schedule
    snr = own_snr(schedule) if cfg.snr is None else cfg.snr
    values = pairwise.mapo(chosen, rejected, beta=cfg.beta, snr=snr, num_timesteps=schedule.num_timesteps)
    with torch.no_grad():
        metrics = {
            "loss": values.detach(),
            "accuracy": accuracy(rejected - chosen),
            "chosen error": chosen.detach(),
            "rejected error": rejected.detach(),
        }
    return Step(values, contrast.weights, metrics)


def own_snr(schedule: Schedule) -> float:
    """Return the release's snr, converted to the unit of the schedule's prediction target."""
    return SNR * schedule.epsilon_weight if isinstance(schedule, Flow) else SNR
