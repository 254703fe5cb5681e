"""Generation of rejected responses: plain sampling, and BDHS, which hides most of an image from the model.

One generation call covers all sentences of all rows. Random draws are keyed by the row, so each text comes out as it
would alone. Nothing is trained here: the network is unwrapped, and no process waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmalign.config import BdhsConfig, DecodingConfig
from mmalign.data.pairs import stable_hash
from mmalign.families.base import VisionLanguage
from mmalign.families.types import GeneratedText, ImageFeatures, ImageView
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.rng import KeyedRNG
from mmalign.synthesis.sentence_cuts import STOPS, WHOLE, Opening, Part, joined, openings
from mmalign.synthesis.similarity import Similarity


@dataclass(frozen=True)
class GroundTruthAnswer:
    """A prompt with its true answer.

    Attributes:
        row: the key of its random draws.
        turns: the conversation to answer.
        answer: the true answer.
        images: the images' keys and model inputs, in the order of their placeholders.
    """

    row: int
    turns: tuple[Turn, ...]
    answer: str
    images: tuple[tuple[str, ImageView], ...]


@dataclass(frozen=True)
class Completion:
    """A generated answer, the number of attempts used, and the text's similarity to the true answer.

    `is_cut` says that a part was cut at the limit of new tokens.
    """

    text: str
    tries: int
    similarity: float
    is_cut: bool = False


def require_image_masking(family: VisionLanguage) -> None:
    """Refuse a model whose image tokens cannot be hidden.

    Raises:
        ValueError: the family does not support image masking; the message gives its reason.
    """
    if family.image_masking_unsupported_reason:
        raise ValueError(
            f"model.path: BDHS masks an image for {family.name}, which cannot be done "
            f"({family.image_masking_unsupported_reason}); use another model, or other rejected responses: `prepare` "
            "with kind: povid changes words by rule"
        )


@dataclass(frozen=True)
class ResponseSampler:
    """A model that completes answers.

    Attributes:
        family: the model.
        net: its unwrapped network, of the policy or of the reference.
        rng: the random numbers of an epoch.
        whole_sentences: leave out a sentence that the limit of new tokens cut: its torn end would tell a rejected
            response from a chosen one.
    """

    family: VisionLanguage
    net: nn.Module
    rng: KeyedRNG
    whole_sentences: bool = False

    @torch.no_grad()
    def sample(
        self,
        rows: Sequence[GroundTruthAnswer],
        parts: Sequence[Sequence[Part]],
        features: ImageFeatures,
        decoding: DecodingConfig,
        attempt: int,
        hidden: Sequence[Tensor] | None = None,
        stop: Sequence[str] = (),
    ) -> list[GeneratedText]:
        """Generate the continuation of every opening in one call, and return each row's joined answer.

        Args:
            rows: the prompts, N.
            parts: the parts of each row's answer.
            features: the features of the rows' images.
            decoding: the decoding settings.
            attempt: the attempt's number, part of the key of the random draws.
            hidden: each row's mask of hidden image tokens; None hides none.
            stop: texts that end a continuation; the first one belongs to it.
        """
        # One prompt per opening, keyed by row, attempt and place
        read, prompts, keys, masks = self.family.processor, list[TokenizedResponse](), list[int](), list[Tensor]()
        for number, row in enumerate(rows):
            for place, part in enumerate(parts[number]):
                if isinstance(part, Opening):
                    prompts.append(read.tokenize_prompt(row.turns, row.images, part.start))
                    keys.append(stable_hash(str(row.row), str(attempt), str(place)))
                    masks += [hidden[number]] if hidden is not None else []
        if not prompts:
            return [GeneratedText(joined(texts, [])) for texts in parts]
        masked = masks if hidden is not None else None
        answers = self.family.generate(
            self.net, prompts, features, decoding, rows=keys, rng=self.rng, hidden=masked, stop=stop
        )
        # Continuations return to their rows in the order of the openings
        rest, results = iter(answers), list[GeneratedText]()
        for texts in parts:
            own = [next(rest) for part in texts if isinstance(part, Opening)]
            results.append(
                GeneratedText(joined(texts, own, whole=self.whole_sentences), any(answer.is_cut for answer in own))
            )
        return results


def bdhs(
    sampler: ResponseSampler,
    rows: Sequence[GroundTruthAnswer],
    features: ImageFeatures,
    masking: BdhsConfig,
    similarity: Similarity,
) -> list[Completion]:
    """Run bias-driven hallucination sampling (arXiv:2407.02477, Algorithm 1) on many rows at once.

    An attempt hides a row's image tokens (m_j = 1, token j is seen, iff rho_j >= rho_th). It cuts every sentence at a
    random place and lets the model continue from the true words before the cut. A text is accepted if it differs enough
    from the true answer. The last of several attempts generates a whole unguided answer, which is always accepted.

    Returns:
        N completions. A text may be empty, or equal the true answer if the model knows it without looking.

    Raises:
        ValueError: the model's image tokens cannot be hidden.
    """
    require_image_masking(sampler.family)
    done: dict[int, Completion] = {}
    for attempt in range(1, masking.tries + 1):
        # Rows without an accepted text; the last of several attempts is unguided
        left = [number for number in range(len(rows)) if number not in done]
        open_rows, guided = [rows[number] for number in left], attempt < masking.tries or masking.tries == 1
        parts = [openings(row.answer, row.row, sampler.rng, attempt) if guided else WHOLE for row in open_rows]
        hidden = [_hidden(sampler, row, masking, attempt) for row in open_rows]
        answers = sampler.sample(open_rows, parts, features, masking, attempt, hidden, STOPS if guided else ())
        scores = similarity([answer.text for answer in answers], [row.answer for row in open_rows])
        for number, answer, score in zip(left, answers, scores, strict=True):
            if score < masking.max_similarity or attempt == masking.tries:
                done[number] = Completion(answer.text, attempt, score, answer.is_cut)
    return [done[number] for number in range(len(rows))]


def _hidden(sampler: ResponseSampler, row: GroundTruthAnswer, masking: BdhsConfig, attempt: int) -> Tensor:
    """Return the mask of a prompt's image tokens hidden in one attempt, the same for all its sentences."""
    read = sampler.family.processor
    number = len(read.image_token_positions(read.tokenize_prompt(row.turns, row.images)))
    rho = sampler.rng.uniform([row.row], (number,), "hidden", attempt)[0]
    # Each token is hidden with probability rho, or all but a number of them are
    if masking.keep_tokens is None:
        return rho < masking.rho
    seen = rho.topk(min(masking.keep_tokens, number)).indices
    return torch.ones(number, dtype=torch.bool).index_fill(0, seen, False)


def too_long_reason(sampler: ResponseSampler, row: GroundTruthAnswer, start: str, new: int) -> str | None:
    """Return a reason why `new` tokens after a row's prompt and `start` exceed the model's length; None if they fit.

    Raises:
        ValueError: the prompt's placeholders do not match its images.
    """
    read = sampler.family.processor
    length = len(read.tokenize_prompt(row.turns, row.images, start).ids)
    if length + new <= read.max_length:
        return None
    subject = "prompt and answer have" if start else "the prompt has"
    return f"{subject} {length:,} tokens, and the model, which may add {new:,}, reads {read.max_length:,}"
