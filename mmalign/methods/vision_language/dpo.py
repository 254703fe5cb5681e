"""DPO (arXiv:2305.18290, eq. 7) on responses to images: prefer the chosen one, by the log-probability of its words.

    score = sum_t log p(y_t | image, prompt, y_<t)      over the response's tokens, for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin)) + nll * mean_t -log p(y_t)      of the chosen y

Any pair loss can replace -log sigma. IPO, SimPO and ORPO are made for means over a response's tokens, as in TRL, all
others for sums; `score` sets either. Losses without a reference load none. `nll` is 0 in the paper. A positive value
keeps the chosen response likely while the margin grows, as in arXiv:2404.19733.

kB rows: prompts with the chosen responses, then with the rejected, then with the further views of other methods.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mmalign.config.methods.kinds import ResponseMethodConfig
from mmalign.config.methods.vision_language import DPOConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.methods import Requirements, Step, reference_scores
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.vision_language._responses import Contrast, response_scores, response_step
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the reference of the loss, or its cached scores."""
    return pair_requirements(cfg, int(cfg.reference is None), {"mean": cfg.mean})


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the unchanged pairs."""
    score = partial(response_scores, policy.family, batch=batch, mean=cfg.mean)
    return [Contrast(batch, reference_scores(policy, batch, score))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: ResponseMethodConfig) -> Step:
    """Return the pair loss on the log-probabilities of policy and reference."""
    batch, weights = contrast.batch, contrast.token_weights
    policy_scores = response_scores(policy.family, policy.model, batch, mean=cfg.mean, weights=weights)
    step = response_step(present(cfg, policy.memory), policy_scores, contrast.reference, batch)
    return replace(step, summary=contrast.summary)
