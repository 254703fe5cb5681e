"""Re-Align's rDPO (arXiv:2502.13146): prefer the chosen response to the rejected one, and its image to a similar one.

    score(y | v) = sum_t log p(y_t | v, prompt, y_<t)                               for policy and reference
    loss = -log sigma(beta * (chosen | v  against  rejected | v))                    DPO
           + image_weight * -log sigma(beta * (chosen | v  against  chosen | v_l))   visual DPO

v_l is the retrieved image that the rejected response was generated from. All scores are of the written tokens. For the
rejected response, and for the chosen one under v_l, the released trainer instead scores each network's likeliest token
other than the written one, along the written history. The paper does not mention this. `rejected_scoring: competitor`
does it, for one more forward pass of the policy.

3B rows: chosen, rejected, chosen with the retrieved image. Both terms accept any pair loss, as in `dpo`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmalign.config.methods.vision_language import ReAlignConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language.tokens import Tokens
from mmalign.methods import Requirements, Step, reference_scores
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.vision_language._responses import PAIR, Contrast, losses_against, response_scores, response_step
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

VIEWS = (*PAIR, "retrieved")


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: the pairs' other images, and the reference of the loss or its cached scores."""
    settings = {"mean": cfg.mean, "rejected_scoring": cfg.rejected_scoring}
    return replace(pair_requirements(cfg, int(cfg.reference is None), settings), other_images=True)


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: the pairs, and the chosen responses again under the retrieved images."""
    assert batch.other_images is not None, "realign needs other images"
    whole = replace(batch, tokens=Tokens.cat([batch.tokens, batch.other_images]))

    # Each network scores its own competitors of the written tokens
    def score(net: nn.Module) -> Scores:
        targets = scored_tokens(policy.family, net, whole, cfg)
        return response_scores(policy.family, net, whole, views=VIEWS, mean=cfg.mean, targets=targets)

    targets = scored_tokens(policy.family, policy.unwrapped, whole, cfg)
    return [Contrast(whole, reference_scores(policy, batch, score), targets=targets)]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return L_DPO + w_v * L_vDPO."""
    cfg = present(cfg, policy.memory)
    batch, reference_scores = contrast.batch, contrast.reference
    policy_scores = response_scores(
        policy.family, policy.model, batch, views=VIEWS, mean=cfg.mean, targets=contrast.targets
    )
    text, image = losses_against(cfg, policy_scores, reference_scores, batch, "retrieved")
    terms = {"text loss": text, "image loss": cfg.image_weight * image}
    return response_step(cfg, policy_scores, reference_scores, batch, terms)


def scored_tokens(family: VisionLanguage, net: nn.Module, batch: EncodedResponses, cfg: Config) -> Tensor | None:
    """Return the tokens [3B, R] that a network scores: the network's competitors of all but the chosen responses.

    None if they are the written ones.
    """
    if cfg.rejected_scoring == "written":
        return None
    written, pairs = batch.tokens.responses, len(batch.rows)
    competitors = family.argmax(net, batch.tokens, batch.features, written)
    return torch.cat([written[:pairs], competitors[pairs:]])
