"""RAFT (arXiv:2304.06767): fine-tuning on the best of the policy's own answers.

    y^1 ... y^K ~ policy(image, question)
    loss = mean_t -log p(y_t | image, question, y_<t)      of the answer with the largest reward

`select: rejection` takes each answer with probability `exp((R - max R) / temperature)` instead, which samples from the
policy times `exp(R / temperature)` (RSO, arXiv:2309.06657, statistical rejection sampling). The best answer is always
among them; the loss is their mean.

B questions, K answers to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.config.methods.online_responses import RAFTConfig as Config
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.language import scores
from mmalign.methods import Requirements, Step
from mmalign.methods.vision_language._online import answer, online_requirements
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Contrast:
    """Answers to train on.

    Attributes:
        batch: the questions, with M rows of answers.
        question: the index in the batch of each answer's question [M].
        summary: the step's, of all questions of the batch.
    """

    batch: EncodedResponses
    question: Tensor
    summary: Mapping[str, Tensor]


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts and a judge, no reference."""
    return online_requirements(cfg, reference=False, learned=1 if cfg.select == "best" else cfg.generation.answers)


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate and judge the answers to a batch; return the contrasts of one pass after another."""
    answered, contrasts = answer(policy, batch, cfg.generation, rng), list[Contrast]()
    kept = selected(cfg, answered.rewards, rng.uniform(batch.rows, (cfg.generation.answers,), "rejection"))
    for questions in answered.parts(cfg.generation.questions_per_contrast):
        question, k = kept[questions].nonzero().T
        # Answers as (k, b), with b counted in the whole batch
        places = [(number, questions[n]) for n, number in zip(question.tolist(), k.tolist(), strict=True)]
        contrasts.append(Contrast(answered.select(policy.family, questions, places), question, answered.summary))
    return contrasts * cfg.generation.updates


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the negative log-likelihood per token [B], a mean over the answers to a question."""
    batch, question = contrast.batch, contrast.question
    logps, mask = policy.family.token_logps(policy.model, batch.tokens, batch.features), batch.tokens.response_mask
    likelihood, number = scores.mean(logps, mask), question.bincount(minlength=len(batch.rows))
    losses = torch.zeros_like(batch.weights).index_add(0, question, -likelihood) / number
    metrics = {"loss": losses.detach(), "answers trained on": number.to(losses.dtype)}
    return Step(losses, batch.weights, metrics, contrast.summary)


def selected(cfg: Config, rewards: Tensor, uniform: Tensor) -> Tensor:
    """Return a mask [B, K] of the answers to train on, from rewards and uniform numbers [B, K]."""
    largest = rewards.amax(1, keepdim=True)
    if cfg.select == "best":
        return torch.nn.functional.one_hot(rewards.argmax(1), rewards.shape[1]).bool()
    return uniform.to(rewards.device) < ((rewards - largest) / cfg.temperature).exp()
