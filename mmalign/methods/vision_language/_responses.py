"""Log-probabilities of response pairs, shared by the methods for vision-language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmalign.config.methods.kinds import ResponseMethodConfig
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods import Step
from mmalign.methods._pair_loss import label_metrics, pair_losses, pair_of, preference_step, view_losses, with_own_loss
from mmalign.policy import Scores

PAIR = ("chosen", "rejected")
TOKEN = "chosen token"  # the view that always scores the mean over the chosen response's tokens


@dataclass(frozen=True)
class Contrast:
    """Responses to every prompt, and the reference's scores of them.

    Attributes:
        batch: the pairs, with tokens [kB] for k views.
        reference: the reference's scores; None without a reference.
        token_weights: weights of the response tokens [kB, R]; None for 1.
        targets: the tokens [kB, R] that the policy scores; None for the responses' own.
        summary: the step's, of all rows of the batch.
    """

    batch: EncodedResponses
    reference: Scores | None
    token_weights: Tensor | None = None
    targets: Tensor | None = None
    summary: Mapping[str, Tensor] = field(default_factory=dict)


def response_scores(
    family: VisionLanguage,
    net: nn.Module,
    batch: EncodedResponses,
    *,
    views: Sequence[str] = PAIR,
    mean: bool = False,
    weights: Tensor | None = None,
    targets: Tensor | None = None,
) -> Scores:
    """Return the log-probabilities [B] of the chosen responses, the rejected ones and any further views, in nats.

    Args:
        family: the model.
        net: the network of the policy or of the reference.
        batch: the pairs, with tokens [kB] for k views.
        views: the names of the k views, "chosen" and "rejected" first.
        mean: the mean over a response's tokens, not the sum.
        weights: weights of the response tokens [kB, R]; None for 1.
        targets: tokens [kB, R] to score in place of the responses' own, along the same history.
    """
    if targets is None:
        logps = family.token_logps(net, batch.tokens, batch.features)
    else:
        logps = family.token_logps(net, batch.tokens, batch.features, targets[..., None])[..., 0]
    return view_scores(logps, batch.tokens.response_mask, views, mean=mean, weights=weights)


def view_scores(
    logps: Tensor, mask: Tensor, views: Sequence[str] = PAIR, *, mean: bool = False, weights: Tensor | None = None
) -> Scores:
    """Reduce token log-probabilities [kB, R] of k views to scores [B], and add the first view's token mean."""
    if weights is not None:
        each = scores.weighted_mean(logps, mask, weights) if mean else scores.total(logps * weights, mask)
    else:
        each = scores.mean(logps, mask) if mean else scores.total(logps, mask)
    pairs = len(logps) // len(views)
    result = dict(zip(views, each.chunk(len(views)), strict=True))
    return {**result, TOKEN: scores.mean(logps[:pairs], mask[:pairs])}


def losses_against(
    cfg: ResponseMethodConfig,
    policy_scores: Scores,
    reference_scores: Scores | None,
    batch: EncodedResponses,
    view: str,
) -> tuple[Tensor, Tensor]:
    """Return the pair losses [B] of the chosen responses against the rejected ones, and against a further view.

    Preference and margin of a label belong to the two responses; its weight belongs to the row.
    """
    rejected = pair_losses(cfg, batch.labels, *pair_of(policy_scores, reference_scores))
    return rejected, view_losses(cfg, batch.labels, *pair_of(policy_scores, reference_scores, "chosen", view))


def response_step(
    cfg: ResponseMethodConfig,
    policy_scores: Scores,
    reference_scores: Scores | None,
    batch: EncodedResponses,
    terms: Mapping[str, Tensor] | None = None,
) -> Step:
    """Return the step of a response loss; its metrics include log-probabilities, gains and response lengths.

    Args:
        cfg: the pair loss, and the weight of the chosen responses' likelihood term, which is added here.
        policy_scores: the policy's scores.
        reference_scores: the reference's scores; None without a reference.
        batch: the pairs.
        terms: summands of the loss by name, each [B]; if None, the pair loss of chosen and rejected.
    """
    # Metrics of every view and of the response lengths
    pairs, counts = len(batch.rows), batch.tokens.num_tokens.float()
    views = [view for view in policy_scores if view != TOKEN]
    more = {f"{view} log-probability": policy_scores[view].detach() for view in views}
    more |= {"chosen tokens": counts[:pairs], "rejected tokens": counts[pairs : 2 * pairs]}
    more |= label_metrics(cfg, batch.labels, policy_scores, reference_scores)
    if reference_scores is None:
        more["chosen token log-probability"] = policy_scores[TOKEN].detach()
    else:
        gains = {view: (policy_scores[view] - reference_scores[view]).detach() for view in policy_scores}
        more |= {f"{view} gain": gain for view, gain in gains.items() if view not in PAIR}
    # Sum of the terms, plus the chosen responses' negative log-likelihood
    if terms is None:
        losses = pair_losses(cfg, batch.labels, *pair_of(policy_scores, reference_scores))
    else:
        losses = torch.stack(list(terms.values())).sum(0)
        more |= {name: term.detach() for name, term in terms.items()}
    step = preference_step(losses, cfg.beta, policy_scores, reference_scores, batch.weights, more)
    return with_own_loss(step, "nll", cfg.nll + cfg.likelihood, -policy_scores[TOKEN], batch.labels)
