"""DPO (arXiv:2305.18290, eq. 7) on responses to images: prefer the chosen one, by the log-probability of its words.

    score = sum_t log p(y_t | image, prompt, y_<t)      over the response's tokens, for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin))

Any pair loss may stand in the place of -log sigma. IPO's target is a margin in the unit of the scores, and its scores
are means over a response's tokens, as TRL has them; all others' are sums.

2B rows: prompts with the chosen responses first, then with the rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mmalign.draws import Draws
from mmalign.encode_responses import EncodedResponses
from mmalign.families import VisionLanguage
from mmalign.language import scores
from mmalign.methods import Step
from mmalign.methods._pairs import PairLossConfig, bound_loss, preference_step
from mmalign.policy import Policy, Scores

modality = "vision_language"
needs_reference = True


class Config(PairLossConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="in nats: of a response, or with loss: ipo of a token")


@dataclass(frozen=True)
class Contrast:
    """Two responses to every prompt, how the reference scores them, and the weight of each token if they differ."""

    batch: EncodedResponses
    reference: Scores | None
    token_weights: Tensor | None = None


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Any, draws: Draws) -> list[Contrast]:
    """One contrast: the pairs as they are."""
    score = partial(response_scores, policy.family, batch=batch, mean=cfg.loss == "ipo")
    return [Contrast(batch, policy.on_reference(score))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """The pair loss on the policy's and the reference's log-probabilities."""
    assert contrast.reference is not None, "dpo needs a reference"
    ours = response_scores(policy.family, policy.model, contrast.batch, mean=cfg.loss == "ipo")
    return response_step(cfg, ours, contrast.reference, contrast.batch)


def response_scores(
    family: VisionLanguage,
    net: nn.Module,
    batch: EncodedResponses,
    *,
    mean: bool = False,
    weights: Tensor | None = None,
) -> Scores:
    """The log-probabilities [B] of the chosen and the rejected responses, in nats.

    Args:
        family: the model.
        net: its network, or its reference's.
        batch: the pairs.
        mean: divide by the number of a response's tokens.
        weights: of the responses' tokens [2B, R]; the score is then their weighted mean.
    """
    logps, mask = family.token_logps(net, batch.tokens, batch.features), batch.tokens.response_mask
    if weights is not None:
        each = scores.weighted_mean(logps, mask, weights)
    else:
        each = scores.mean(logps, mask) if mean else scores.total(logps, mask)
    chosen, rejected = each.chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def response_step(cfg: PairLossConfig, ours: Scores, theirs: Scores, batch: EncodedResponses) -> Step:
    """The pair loss, with the log-probabilities that the scores are, and the lengths of the responses."""
    chosen, rejected = batch.tokens.counts.float().chunk(2)
    more = {
        "chosen log-probability": ours["chosen"].detach(),
        "rejected log-probability": ours["rejected"].detach(),
        "chosen tokens": chosen,
        "rejected tokens": rejected,
    }
    return preference_step(bound_loss(cfg), cfg.beta, ours, theirs, batch.weights, more)
