"""Answers that the policy generates and a judge scores, learned from before the next ones are generated.

    y^1 ... y^K ~ policy(image, question)          K answers to a question, sampled with keyed random numbers
    R^k = judge(image, question, y^k)

All answers, and the scores of the reference and of the generating policy, are made before a batch's first update, so a
run resumes exactly between batches. A question whose answers have equal rewards has the weight 0. The tokens learned
from are those that were generated; an answer that the limit cut has no token for its end.

B questions, K answers to each. Row `k * B + b` is answer k to question b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmalign.config.methods.online_responses import AnswersConfig, OnlineResponsesConfig
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.pairs import stable_hash
from mmalign.families.base import VisionLanguage
from mmalign.families.types import GeneratedText, Mixture
from mmalign.language.chat import as_text
from mmalign.language.tokens import TokenizedResponse
from mmalign.losses.advantages import informative
from mmalign.methods import Requirements
from mmalign.methods._generated import count_contrasts, parts, summarize_rewards
from mmalign.policy import FrozenCopy, Policy
from mmalign.rng import KeyedRNG

EQUAL_REWARDS = (
    "the judge gave all answers to a question the same score, or no answer can be trained; look at the judge "
    "(method.reward), generate more answers (method.generation.answers), or raise method.generation.temperature"
)


@dataclass(frozen=True)
class Answered:
    """Answers to a batch of questions.

    Attributes:
        batch: the questions, with their images.
        rows: the questions with their answers, K lists [B].
        rewards: [B, K].
        weights: weights of the questions [B].
        summary: the step's, of all questions of the batch.
    """

    batch: EncodedResponses
    rows: list[list[TokenizedResponse]]
    rewards: Tensor
    weights: Tensor
    summary: Mapping[str, Tensor]

    def parts(self, size: int | None) -> list[range]:
        """Return the questions of each contrast, at most `size` of them, as indices in the batch."""
        number = len(self.batch.rows)
        return [range(number)[part] for part in parts(number, size)]

    def select(
        self, family: VisionLanguage, questions: Sequence[int], answers: Sequence[tuple[int, int]]
    ) -> EncodedResponses:
        """Return a batch of some questions, whose rows are answers k to questions b, given as (k, b)."""
        return replace(
            self.batch,
            rows=[self.batch.rows[b] for b in questions],
            pairs=[self.batch.pairs[b] for b in questions],
            tokens=family.processor.collate([self.rows[k][b] for k, b in answers]).to(self.weights.device),
            weights=self.weights[list(questions)],
        )


def online_requirements(cfg: OnlineResponsesConfig, *, reference: bool, learned: int) -> Requirements:
    """Return the needs of a method that learns from so many of its own answers to each question."""
    return Requirements(
        reference=reference,
        learns_from="prompts",
        decoded_images=True,
        contrasts=partial(count_contrasts, cfg.generation.updates, learned, cfg.generation.questions_per_contrast),
        new_tokens=cfg.generation.max_new_tokens,
        reward=cfg.reward,
        combine=cfg.combine,
        hint_if_empty=EQUAL_REWARDS,
    )


def answer(
    policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: AnswersConfig, rng: KeyedRNG, mixture: float = 0.0
) -> Answered:
    """Generate and judge the answers to all questions, in one call; `mixture` is the reference's share of logits."""
    # K answers to each question
    family, number = policy.family, len(batch.rows)
    if mixture and policy.moving is not None and policy.skeleton is not None:
        raise ValueError(
            "method.reference: a moving reference writes no answers with the policy under train.sharding: fsdp2; "
            "leave out method.reference, method.mixture, or the sharding"
        )
    # Random numbers of their own for answer k to question b
    keys = [stable_hash(str(row), str(k)) for k in range(cfg.answers) for row in batch.rows]
    other, prompts = Mixture(policy.on_reference, mixture) if mixture else None, list(batch.tokens.rows) * cfg.answers
    with contextlib.ExitStack() as whole:  # processes generate answers of unequal length
        whole.enter_context(policy.gathered(policy.unwrapped))
        if other is not None and isinstance(policy.reference, FrozenCopy):
            whole.enter_context(policy.gathered(policy.reference.model))
        generated = family.generate(policy.unwrapped, prompts, batch.features, cfg, rows=keys, rng=rng, mixture=other)
    texts = [said.text.strip() for said in generated]
    # Their rewards
    assert batch.judge is not None, "the method needs a judge of responses"
    images = [[batch.decoded_images[ref.key] for ref in pair.images] for pair in batch.pairs]
    asked, truths = [as_text(pair.turns) for pair in batch.pairs], [pair.truth for pair in batch.pairs]
    rewards = batch.judge(images * cfg.answers, asked * cfg.answers, texts, truths * cfg.answers)
    rewards = rewards.view(cfg.answers, number).T
    # Their tokens
    tokenized = [_row(family, prompt, said) for prompt, said in zip(prompts, generated, strict=True)]
    usable = torch.tensor([row is not None for row in tokenized]).view(cfg.answers, number).all(0)
    rows = [row or _placeholder(prompt) for row, prompt in zip(tokenized, prompts, strict=True)]
    # Questions with equal rewards, or with an answer that cannot be trained, count for nothing
    rewards, usable = rewards.to(batch.weights.device), usable.to(batch.weights.device)
    weights = batch.weights * informative(rewards) * usable
    # What the log says, of all questions but padding
    cut = torch.tensor([float(said.is_cut) for said in generated]).view(cfg.answers, number).T
    lengths = torch.tensor([float(len(row.response)) for row in rows]).view(cfg.answers, number).T
    real, means = batch.weights > 0, {"answer tokens": lengths.mean(1), "cut answers": cut.mean(1)}
    means["unusable questions"] = (~usable).float()
    summary = summarize_rewards(rewards, real) | {name: x.to(real.device)[real] for name, x in means.items()}
    return Answered(batch, [rows[k : k + number] for k in range(0, len(rows), number)], rewards, weights, summary)


def _row(family: VisionLanguage, prompt: TokenizedResponse, answer: GeneratedText) -> TokenizedResponse | None:
    """Return a question with an answer; None for an answer that holds tokens of images, or no token at all."""
    row = TokenizedResponse((*prompt.ids, *answer.ids), len(prompt.ids), prompt.images)
    # Tokens of images in the answer would ask for images that nobody gave
    more = len(family.processor.image_token_positions(row)) - len(family.processor.image_token_positions(prompt))
    return row if answer.ids and not more else None


def _placeholder(prompt: TokenizedResponse) -> TokenizedResponse:
    """Return a row of one token in place of an answer that is not learned from."""
    return TokenizedResponse((*prompt.ids, prompt.ids[-1]), len(prompt.ids), prompt.images)
