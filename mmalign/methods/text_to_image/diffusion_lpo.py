"""Diffusion-LPO (arXiv:2510.01540): lists of images with scores, learned as a ranking.

    t, eps, x_t as in Diffusion-DPO, the same for all images of a prompt
    h_i = -1/2 mean(policy's error ** 2) + 1/2 mean(reference's error ** 2)      of image i
    loss = sum_i log(1 + sum_j exp(beta (h_j - h_i)))      over all j of a smaller score

With two images it is Diffusion-DPO. `loss` takes other losses of lists (`mmalign/losses/groups.py`), such as
lambda_rank (RankDPO) and copg. Images of equal scores are not compared. Lists may have different lengths.
"""

from __future__ import annotations

from mmalign.config.methods.text_to_image import ImageListConfig as Config
from mmalign.families.base import TextToImage
from mmalign.methods import Requirements, Step, cached_scores
from mmalign.methods._judged import list_step
from mmalign.methods.text_to_image import diffusion_kto
from mmalign.methods.text_to_image.diffusion_kto import Contrast
from mmalign.policy import Policy

contrasts = diffusion_kto.contrasts


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: lists, and a reference or its cached scores."""
    spec = cached_scores(cfg.num_cached_draws, {"caption_dropout": cfg.caption_dropout})
    return Requirements(learns_from="lists", precompute=spec)


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the group loss on the denoising scores of policy and reference."""
    return list_step(cfg, diffusion_kto.judge(policy, contrast))
