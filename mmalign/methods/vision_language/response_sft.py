"""Supervised fine-tuning on the chosen responses: the baseline that a preference method has to beat.

loss = mean_t -log p(y_t | image, prompt, y_<t)      over the chosen response's tokens; no reference, no rejected one
"""

from __future__ import annotations

from mmalign.config.methods.vision_language import ResponseSFTConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods import Requirements, Step
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


def requirements(_: Config) -> Requirements:
    """Return the method's needs: no reference, and no rejected responses."""
    return Requirements(reference=False, rejected=False)


def contrasts(
    policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG
) -> list[EncodedResponses]:
    """Return the batch itself, so that a comparison with other methods uses the same pairs."""
    return [batch]


def loss(policy: Policy[VisionLanguage], contrast: EncodedResponses, cfg: Config) -> Step:
    """Return the negative log-likelihood per token [B] of the chosen responses."""
    chosen = contrast.tokens[: len(contrast.rows)]
    logps, mask = policy.family.token_logps(policy.model, chosen, contrast.features), chosen.response_mask
    losses = -scores.mean(logps, mask)
    metrics = {
        "loss": losses.detach(),
        "chosen log-probability": scores.total(logps, mask).detach(),
        "chosen token log-probability": -losses.detach(),
        "chosen tokens": chosen.num_tokens.float(),
    }
    return Step(losses, contrast.weights, metrics)
