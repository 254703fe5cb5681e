"""DPO (arXiv:2305.18290, eq. 7) on responses to images: prefer the chosen one, by the log-probability of its words.

    score = sum_t log p(y_t | image, prompt, y_<t)      over the response's tokens, for policy and reference
    loss = -log sigma(beta * (policy's margin - reference's margin)) + nll * mean_t -log p(y_t)      of the chosen y

Any pair loss may stand in the place of -log sigma. IPO's target is a margin in the unit of the scores, and its scores
are means over a response's tokens, as TRL has them; all others' are sums. `nll` is 0 in the paper; a positive one keeps
the chosen response likely while the margin grows, as in arXiv:2404.19733.

kB rows: prompts with the chosen responses first, then with the rejected, then what other methods compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmalign.draws import Draws
from mmalign.encode_responses import EncodedResponses
from mmalign.families import VisionLanguage
from mmalign.language import scores
from mmalign.losses import Pair, PairLoss
from mmalign.methods import Keep, Step, reference_scores
from mmalign.methods._pairs import PairLossConfig, bound_loss, preference_step
from mmalign.policy import Policy, Scores

modality = "vision_language"
needs_reference = True

PAIR = ("chosen", "rejected")
TOKEN = "chosen token"  # the view whose score is the mean over the chosen response's tokens, whatever the others' is


class ResponseLossConfig(PairLossConfig):
    """Which pair loss, and what every method that compares responses may add to it."""

    nll: float = Field(0.0, ge=0, description="the weight of the chosen response's own -log p, a mean over its tokens")


class Config(ResponseLossConfig):
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
    return [Contrast(batch, reference_scores(policy, batch, score))]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """The pair loss on the policy's and the reference's log-probabilities."""
    assert contrast.reference is not None, "dpo needs a reference"
    ours = response_scores(policy.family, policy.model, contrast.batch, mean=cfg.loss == "ipo")
    return response_step(cfg, ours, contrast.reference, contrast.batch)


def keeps(cfg: Any) -> Keep:
    """What the reference's scores depend on besides pairs and reference."""
    return Keep(1, {"mean": cfg.loss == "ipo"}, scores=True)


def response_scores(
    family: VisionLanguage,
    net: nn.Module,
    batch: EncodedResponses,
    *,
    views: Sequence[str] = PAIR,
    mean: bool = False,
    weights: Tensor | None = None,
) -> Scores:
    """The log-probabilities [B] of the chosen responses, the rejected ones and of further views, in nats.

    Args:
        family: the model.
        net: its network, or its reference's.
        batch: the pairs; its tokens are [kB] rows for k views.
        views: the names of the k views, "chosen" and "rejected" first.
        mean: divide by the number of a response's tokens.
        weights: of the responses' tokens [kB, R]; the score is then their weighted mean.
    """
    logps = family.token_logps(net, batch.tokens, batch.features)
    return view_scores(logps, batch.tokens.response_mask, views, mean=mean, weights=weights)


def view_scores(
    logps: Tensor, mask: Tensor, views: Sequence[str] = PAIR, *, mean: bool = False, weights: Tensor | None = None
) -> Scores:
    """Token log-probabilities [kB, R] of k views as their scores [B], and the first view's mean over tokens."""
    if weights is not None:
        each = scores.weighted_mean(logps, mask, weights)
    else:
        each = scores.mean(logps, mask) if mean else scores.total(logps, mask)
    pairs = len(logps) // len(views)
    found = dict(zip(views, each.chunk(len(views)), strict=True))
    return {**found, TOKEN: scores.mean(logps[:pairs], mask[:pairs])}


def against(link: PairLoss, ours: Scores, theirs: Scores, view: str) -> Tensor:
    """The pair loss [B] that prefers the chosen responses to another view."""
    return link(Pair(ours["chosen"], ours[view]), Pair(theirs["chosen"], theirs[view]))


def response_step(
    cfg: ResponseLossConfig,
    ours: Scores,
    theirs: Scores,
    batch: EncodedResponses,
    terms: Mapping[str, Tensor] | None = None,
) -> Step:
    """The loss, with the log-probabilities that the scores are, and the lengths of the responses.

    Args:
        cfg: which pair loss, and the weight of the chosen responses' likelihood, which is added here.
        ours: the policy's scores.
        theirs: the reference's.
        batch: the pairs.
        terms: what the loss is a sum of, each [B], by name; the pair loss on chosen and rejected if not given.
    """
    pairs, counts = len(batch.rows), batch.tokens.counts.float()
    views = [view for view in ours if view != TOKEN]
    more = {f"{view} log-probability": ours[view].detach() for view in views}
    more |= {"chosen tokens": counts[:pairs], "rejected tokens": counts[pairs : 2 * pairs]}
    more |= {f"{view} gain": (ours[view] - theirs[view]).detach() for view in views if view not in PAIR}
    step = preference_step(bound_loss(cfg), cfg.beta, ours, theirs, batch.weights, more)
    losses = step.losses if terms is None else torch.stack(list(terms.values())).sum(0)
    told = {name: term.detach() for name, term in (terms or {}).items()}
    if cfg.nll:
        losses = losses - cfg.nll * ours[TOKEN]
        told["nll"] = -ours[TOKEN].detach()
    return replace(step, losses=losses, metrics={**step.metrics, **told, "loss": losses.detach()})
