"""Diffusion-KTO (arXiv:2404.04465): images that are liked or not, each alone.

    t, eps, x_t as in Diffusion-DPO, for each image
    gain = -1/2 mean(policy's error ** 2) + 1/2 mean(reference's error ** 2)
    z = beta * (gain - baseline)
    loss = weight * sigma(-z) for a liked image, weight * sigma(z) for another

`loss: bco` and `loss: apo_zero_unpaired` replace the sigmoid. `beta` and `liked_share` are the release's. Its
`beta_dpo` of 1000 multiplies differences of errors, twice our scores. 80 % of an epoch's images are liked.

The release's baseline is the mean gain of a batch, at least 0. Ours is an average over earlier updates (`Memory`), read
one update late: an image's loss then does not depend on its batch, and a resumed run repeats an uninterrupted one.

KB rows: the first images, then the second ones of lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mmalign.config.methods.text_to_image import DiffusionKTOConfig as Config
from mmalign.config.methods.text_to_image import ImageListConfig
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step, cached_scores, reference_scores
from mmalign.methods._judged import OUTPUTS, Judged, thumbs_requirements, thumbs_step
from mmalign.methods.text_to_image._denoising import NoisedPairs, denoising_scores, noise_pairs
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Contrast:
    """Noised images [KB], the reference's scores of them, their labels or scores [B, K], and the rows' weights [B]."""

    view: NoisedPairs
    reference: Scores | None
    scores: Tensor
    weights: Tensor


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: thumbs, and a reference or its cached scores."""
    return thumbs_requirements(cfg, cached_scores(cfg.num_cached_draws, {"caption_dropout": cfg.caption_dropout}))


def contrasts(
    policy: Policy[TextToImage], batch: EncodedPairs, cfg: Config | ImageListConfig, rng: KeyedRNG
) -> list[Contrast]:
    """Return one contrast: all images, those of a row under the same noise."""
    assert batch.scores is not None, "judged images have scores"
    view = noise_pairs(policy.family, batch, cfg.caption_dropout, rng)
    scores = reference_scores(policy, batch, partial(_output_scores, policy.family, view, len(batch.rows)))
    return [Contrast(view, scores, batch.scores, batch.weights)]


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the unpaired loss on the denoising scores of policy and reference."""
    return thumbs_step(cfg, policy.memory, judge(policy, contrast))


def judge(policy: Policy[TextToImage], contrast: Contrast) -> Judged:
    """Run the policy, and return the scores of all images."""
    assert contrast.reference is not None, "the method needs a reference"
    number, most = contrast.scores.shape
    scores = _output_scores(policy.family, contrast.view, number, policy.model)[OUTPUTS]
    errors = {"output error": -2 * scores.detach()}
    # Cached scores may be those of a batch with longer lists
    return Judged(scores, contrast.reference[OUTPUTS][:, :most], contrast.scores, contrast.weights, errors)


def _output_scores(family: TextToImage, view: NoisedPairs, number: int, net: nn.Module) -> Scores:
    """Return the denoising scores [B, K] of the images of B rows."""
    scores = denoising_scores(family, net, view, [OUTPUTS])[OUTPUTS]
    return {OUTPUTS: scores.reshape(-1, number).T}
