"""What a model says in the place of the truth, and BDHS, which hides most of the image from it.

All sentences of all rows are asked for together, and each comes out as it would alone: what is drawn for a row is keyed
by the row. Nothing here learns; the network is the bare one, and no process waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.data.pairs import stable_hash
from mmalign.families.base import VisionLanguage
from mmalign.families.types import Decoding, ImageFeatures, ImageView
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.rng import KeyedRNG
from mmalign.synthesis.sentence_cuts import STOPS, WHOLE, Opening, Part, joined, openings
from mmalign.synthesis.similarity import Similarity


@dataclass(frozen=True)
class GroundTruthAnswer:
    """A prompt with its true answer.

    Attributes:
        row: the key of everything that is drawn for it.
        turns: the conversation that is answered.
        answer: the true one.
        images: their keys and what a model takes of them, in the order of their places.
    """

    row: int
    turns: tuple[Turn, ...]
    answer: str
    images: tuple[tuple[str, ImageView], ...]


@dataclass(frozen=True)
class Completion:
    """What a model said.

    Attributes:
        text: the whole of the other answer.
        tries: how many it took.
        similarity: of the text and the true answer.
    """

    text: str
    tries: int
    similarity: float


@dataclass(frozen=True)
class ImageMaskingConfig:
    """The settings of BDHS.

    Attributes:
        rho: how likely each of an image's tokens is hidden.
        keep_tokens: instead, how many of a prompt's image tokens are left; None goes by `rho`.
        tries: the most there are; of several, the last one writes a whole answer of its own.
        max_similarity: a text this similar to the true answer is tried again.
        decoding: how a sentence, and at last an answer, is written.
    """

    rho: float
    keep_tokens: int | None
    tries: int
    max_similarity: float
    decoding: Decoding


def masking_config(section: Any) -> ImageMaskingConfig:
    """The settings of a recipe's section (`mmalign.config.BdhsConfig`)."""
    decoding = Decoding(section.max_new_tokens, section.temperature, batch_size=section.batch_size)
    return ImageMaskingConfig(section.rho, section.keep_tokens, section.tries, section.max_similarity, decoding)


def require_image_masking(family: VisionLanguage) -> None:
    """Refuse a model whose image tokens cannot be hidden.

    Raises:
        ValueError: why they cannot.
    """
    if family.image_masking_unsupported_reason:
        raise ValueError(
            f"model.path: BDHS hides an image from {family.name}, which cannot be done "
            f"({family.image_masking_unsupported_reason}); use "
            "another model, or another way to untrue answers: `prepare` with kind: povid changes words by rule"
        )


@dataclass(frozen=True)
class ResponseSampler:
    """A model that completes answers.

    Attributes:
        family: the model.
        net: its bare network: the policy's, or the reference's.
        rng: the seed and the epoch of all that is drawn.
    """

    family: VisionLanguage
    net: nn.Module
    rng: KeyedRNG

    @torch.no_grad()
    def sample(
        self,
        rows: Sequence[GroundTruthAnswer],
        parts: Sequence[Sequence[Part]],
        features: ImageFeatures,
        decoding: Decoding,
        attempt: int,
        hidden: Sequence[Tensor] | None = None,
    ) -> list[str]:
        """Each row's answer with what the model says after its openings; all of them are asked for in one call.

        Args:
            rows: the prompts, N.
            parts: of each row's answer.
            features: of the rows' images.
            decoding: how the model goes on.
            tried: which attempt this is; each draws anew.
            hidden: for each row which of its image tokens are hidden; None hides none.
        """
        read, prompts, keys, masks = self.family.processor, list[TokenizedResponse](), list[int](), list[Tensor]()
        for number, row in enumerate(rows):
            for place, part in enumerate(parts[number]):
                if isinstance(part, Opening):
                    prompts.append(read.tokenize_prompt(row.turns, row.images, part.start))
                    keys.append(stable_hash(str(row.row), str(attempt), str(place)))
                    masks += [hidden[number]] if hidden is not None else []
        if not prompts:
            return [joined(some, []) for some in parts]
        masked = masks if hidden is not None else None
        answers = self.family.generate(self.net, prompts, features, decoding, rows=keys, rng=self.rng, hidden=masked)
        rest = iter(answers)
        return [joined(some, [next(rest) for part in some if isinstance(part, Opening)]) for some in parts]


def bdhs(
    sampler: ResponseSampler,
    rows: Sequence[GroundTruthAnswer],
    features: ImageFeatures,
    masking: ImageMaskingConfig,
    similarity: Similarity,
) -> list[Completion]:
    """Bias-driven hallucination sampling (arXiv:2407.02477, Algorithm 1), of many rows at once.

    A try hides a row's image tokens (m_j = 1, token j is seen, iff rho_j >= rho_th), cuts every sentence at a random
    place, and lets the model go on after the true words before it. It is taken if the text differs enough from the true
    answer; the last of several is a whole answer without any guidance, and taken whatever it says.

    Args:
        sampler: the model that is to hallucinate.
        rows: the true answers.
        features: of their images.
        masking: the settings.
        similarity: the measure that `how.similar` is a value of.

    Returns:
        A completion a row. Its text may be empty, or the true answer: a model may know it without looking.

    Raises:
        ValueError: the model's image tokens cannot be hidden.
    """
    require_image_masking(sampler.family)
    done: dict[int, Completion] = {}
    for attempt in range(1, masking.tries + 1):
        left = [number for number in range(len(rows)) if number not in done]
        open_rows, guided = [rows[number] for number in left], attempt < masking.tries or masking.tries == 1
        parts = [openings(row.answer, row.row, sampler.rng, attempt) if guided else WHOLE for row in open_rows]
        decoding = replace(masking.decoding, stop=STOPS if guided else ())
        hidden = [_hidden(sampler, row, masking, attempt) for row in open_rows]
        texts = sampler.sample(open_rows, parts, features, decoding, attempt, hidden)
        scores = similarity(texts, [row.answer for row in open_rows])
        for number, text, score in zip(left, texts, scores, strict=True):
            if score < masking.max_similarity or attempt == masking.tries:
                done[number] = Completion(text, attempt, score)
    return [done[number] for number in range(len(rows))]


def _hidden(sampler: ResponseSampler, row: GroundTruthAnswer, masking: ImageMaskingConfig, attempt: int) -> Tensor:
    """Which of a prompt's image tokens are hidden in a try, for all its sentences alike."""
    read = sampler.family.processor
    number = len(read.image_token_positions(read.tokenize_prompt(row.turns, row.images)))
    rho = sampler.rng.uniform([row.row], (number,), "hidden", attempt)[0]
    if masking.keep_tokens is None:
        return rho < masking.rho
    seen = rho.topk(min(masking.keep_tokens, number)).indices
    return torch.ones(number, dtype=torch.bool).index_fill(0, seen, False)


def too_long_reason(sampler: ResponseSampler, row: GroundTruthAnswer, start: str, new: int) -> str | None:
    """Why a model cannot say that many tokens more after a row's prompt and a beginning; None if it can.

    Raises:
        ValueError: the prompt's placeholders do not match its images.
    """
    read = sampler.family.processor
    length = len(read.tokenize_prompt(row.turns, row.images, start).ids)
    if length + new <= read.max_length:
        return None
    subject = "prompt and answer have" if start else "the prompt has"
    return f"{subject} {length:,} tokens, and the model, which may add {new:,}, reads {read.max_length:,}"
