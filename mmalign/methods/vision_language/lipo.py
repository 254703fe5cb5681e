"""LiPO (arXiv:2402.01878): lists of responses with scores, learned as a ranking.

    h_i = sum_t log p(y_t | image, prompt, y_<t)      of the policy, minus the reference's, of response i
    loss = sum_ij weight_ij softplus(-beta (h_i - h_j))      over all pairs with score_i > score_j

The weight is the effect of exchanging both on the discounted gain of the ranking (`lambda_rank`). `loss` takes other
losses of lists (`mmalign/losses/groups.py`). Those without a reference, pro and rrhf, compare means over tokens.
Responses of equal scores are not compared. Lists may have different lengths.
"""

from __future__ import annotations

from mmalign.config.methods.vision_language import LiPOConfig as Config
from mmalign.families.base import VisionLanguage
from mmalign.methods import Requirements, Step, cached_scores
from mmalign.methods._judged import OUTPUTS, list_step
from mmalign.methods.vision_language import kto
from mmalign.methods.vision_language._responses import Contrast
from mmalign.policy import Policy

contrasts = kto.contrasts


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: lists, and a reference or its cached scores unless the loss has none."""
    compares = not cfg.loss.of_responses
    cached = cached_scores(int(compares and cfg.reference is None), {})
    return Requirements(reference=compares, learns_from="lists", precompute=cached)


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the group loss on the log-probabilities."""
    return list_step(cfg, kto.judge(policy, contrast, kto.TOKENS if cfg.loss.of_responses else OUTPUTS))
