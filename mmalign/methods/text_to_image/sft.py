"""Supervised fine-tuning on the chosen images: the baseline that a preference method has to beat.

loss = mean((target - network(x_t, t, prompt)) ** 2) on the chosen image alone (arXiv:2006.11239, eq. 14)
"""

from __future__ import annotations

from mmalign.config.methods.text_to_image import SFTConfig as Config
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.diffusion.noise import mean_square
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step
from mmalign.methods.text_to_image._denoising import Contrast, noise_pairs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(_: Config) -> Requirements:
    """Return the method's needs: no reference."""
    return Requirements(reference=False)


def contrasts(policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return the chosen half of Diffusion-DPO's contrast, so that a comparison has the same images and noise."""
    view = noise_pairs(policy.family, batch, cfg.caption_dropout, rng)
    return [Contrast(view[: len(batch.rows)], None, batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the mean squared error [B] of the chosen images."""
    view = contrast.view
    error = mean_square(policy.family.predict(policy.model, view.x_t, view.t, view.cond), view.target)
    return Step(error, contrast.weights, {"loss": error.detach(), "chosen error": error.detach()})
