"""GRPO (arXiv:2402.03300): the policy gradient of its own answers, each with its advantage over the others.

    y^1 ... y^K ~ old policy(image, question);  A^k = (R^k - mean R) / std R
    r_t = policy(y_t) / old policy(y_t)
    loss_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta (e^d_t - d_t - 1)
    d_t = log reference(y_t) - log policy(y_t)

`reduction` averages over tokens: within each answer and then over answers (GRPO), as a sum divided by the limit of
tokens (Dr. GRPO, arXiv:2503.20783), or over all tokens of an update (DAPO, arXiv:2503.14476). `importance: sequence`
takes the geometric mean of an answer's ratios (GSPO, arXiv:2507.18071). Standard deviations divide by K - 1, as TRL's.
Log-probabilities are those at temperature 1. Until the first update the policy is the old one, so the first contrast of
a batch that is learned from once needs no pass for it.

B questions, K answers to each: KB rows. R is the most tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mmalign.config.methods.online_responses import GRPOConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.losses import advantages, policy_gradient
from mmalign.methods import Requirements, Step
from mmalign.methods.vision_language._online import answer, online_requirements
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Contrast:
    """Answers to some questions.

    Attributes:
        batch: the answers, [KB] rows.
        advantages: [KB].
        old: log-probabilities of the policy that generated them [KB, R]; None for those of the policy itself.
        reference: the reference's [KB, R]; None without a reference.
        summary: the step's, of all questions of the batch.
    """

    batch: EncodedResponses
    advantages: Tensor
    old: Tensor | None
    reference: Tensor | None
    summary: Mapping[str, Tensor]


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts, a judge, and a reference for the KL divergence."""
    return online_requirements(cfg, reference=cfg.beta > 0, learned=cfg.generation.answers)


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate and judge the answers to a batch; return the contrasts of one pass after another."""
    answered, family, contrasts = answer(policy, batch, cfg.generation, rng), policy.family, list[Contrast]()
    values = _advantages(cfg, answered.rewards, batch.weights, policy.total)
    once = answered.parts(cfg.generation.questions_per_contrast)
    for questions in once:
        # Row k * B + b is answer k to question b
        every = [(k, b) for k in range(cfg.generation.answers) for b in questions]
        given = answered.select(family, questions, every)
        # Old scores, unless no update precedes the only use of this contrast
        moves = bool(contrasts) or cfg.generation.updates > 1
        score = partial(family.token_logps, tokens=given.tokens, features=given.features)
        old, reference = policy.on_both(score) if moves else (None, policy.on_reference(score))
        contrasts.append(Contrast(given, values[questions].T.flatten(), old, reference, answered.summary))
    return contrasts * cfg.generation.updates


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the reduced loss [B] of the questions' answers."""
    batch = contrast.batch
    number, mask = len(batch.rows), batch.tokens.response_mask
    logps = policy.family.token_logps(policy.model, batch.tokens, batch.features)
    # No update since the answers: the policy is the old one
    old = logps.detach() if contrast.old is None else contrast.old
    ratio = policy_gradient.ratios(logps, old, mask, cfg.importance)
    limits = (contrast.advantages[:, None], cfg.clip_low, cfg.clip_high)
    losses = policy_gradient.clipped(ratio, *limits)
    metrics = {"clipped": policy_gradient.is_clipped(ratio, *limits).float()}
    if contrast.reference is not None:
        metrics["kl"] = policy_gradient.k3(logps, contrast.reference)
        losses = losses + cfg.beta * metrics["kl"]

    # Reduction over tokens and answers; with dapo a question weighs as many times as its answers have tokens
    tokens, weights = mask.sum(1).view(-1, number), batch.weights
    sums = scores.total(losses, mask).view(-1, number)  # [K, B]
    if cfg.reduction == "dapo":
        each, weights = sums.sum(0) / tokens.sum(0), weights * tokens.sum(0)
    elif cfg.reduction == "dr_grpo":
        each = sums.mean(0) / cfg.generation.max_new_tokens
    else:
        each = (sums / tokens).mean(0)
    # Means over the tokens of an answer, then over answers
    means = {name: (scores.total(x.detach(), mask).view(-1, number) / tokens).mean(0) for name, x in metrics.items()}
    return Step(each, weights, {"loss": each.detach(), **means}, contrast.summary)


def _advantages(cfg: Config, rewards: Tensor, weights: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the advantages [B, K] of rewards [B, K]; padding is not in a batch's standard deviation."""
    if cfg.advantages == "leave_one_out":
        return advantages.leave_one_out(rewards)
    return advantages.advantages(rewards, scale=cfg.advantages, unbiased=True, weights=weights, total=total)
