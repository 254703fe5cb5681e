"""BDHS (arXiv:2407.02477, Algorithm 1 and eq. 5): prefer the true answer to what the model says where it is blind.

    score(y) = sum_t log p(y_t | image, prompt, y_<t)                           for policy and reference
    loss = gamma * -log sigma(beta * (chosen against rejected))                 the data's own rejected response
           + (1 - gamma) * -log sigma(beta * (chosen against hallucinated))     eq. 5

`hallucinated` is a completion of the chosen response with most of the image's tokens masked (`mmalign.synthesis.bdhs`).
There are three modes:

offline  The data contain it, as written by `mmalign prepare`. It is either the rejected response itself, which makes
         this method `dpo`, or in the column `hallucinated` beside a rejected response of the data.
online   The policy generates it for every batch. `gamma: 0` omits the rejected responses of the data.
mixed    Mixed-DPO (eq. 4): with probability `share` a pair is replaced by two answers that the policy samples and an
         annotator orders.

Image tokens are masked during generation, never during scoring. A pair without a usable generated response falls back
to the responses of the data. Processes generate independently, so one may need more tries than another; each returns
one contrast per batch.

3B rows: chosen, rejected and hallucinated; or 2B rows: chosen and rejected. Any pair loss fits, as in `dpo`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmalign.config.methods.vision_language import BDHSMethodConfig as Config
from mmalign.config.methods.vision_language import MixedConfig
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.language.chat import as_text
from mmalign.language.objects import Vocabulary
from mmalign.language.tokens import TokenizedResponse, cut_tail
from mmalign.language.vocabularies import load_vocabulary
from mmalign.methods import Requirements, Step, reference_scores, reference_scores_of
from mmalign.methods._pair_memory import pair_requirements, present
from mmalign.methods.vision_language._responses import PAIR, TOKEN, losses_against, response_scores, response_step
from mmalign.policy import Policy, Scores
from mmalign.registry import user_function
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import Completion, GroundTruthAnswer, ResponseSampler, bdhs, too_long_reason
from mmalign.synthesis.sentence_cuts import WHOLE, contradicts
from mmalign.synthesis.similarity import Similarity, is_fallback, load_similarity

VIEWS = (*PAIR, "hallucinated")
RULES = "rules"
NO_COMPLETION = Completion("", 0, 0.0)
# (pair, images, first answer, second answer) -> above 0 if the first is better, below 0 if the second is, 0 for a tie
Annotator = Callable[[ResponsePair, Sequence[Image.Image], str, str], float]


@dataclass(frozen=True)
class Contrast:
    """Two or three responses to every prompt, with the reference's scores.

    Attributes:
        batch: the responses [2B], or with hallucinated ones [3B].
        shares: the rejected response's share of the loss [B]; None if the batch has no hallucinated responses.
        summary: the step's summary of the generation.
        reference: the reference's scores.
    """

    batch: EncodedResponses
    shares: Tensor | None
    summary: dict[str, Tensor]
    reference: Scores | None

    @property
    def views(self) -> tuple[str, ...]:
        """Names of each pair's responses."""
        return PAIR if self.shares is None else VIEWS


def check(cfg: Config) -> list[str]:
    """Check the similarity model, annotator and vocabulary before loading, and return lines for the log.

    Raises:
        ValueError: a similarity model, a vocabulary or an annotator is missing.
    """
    if cfg.mode == "online":
        similarity = _similarity(cfg.online.similarity)
        fallback = is_fallback(cfg.online.similarity, similarity)
        why = ", since no sentence-transformers model is installed" if fallback else ""
        return [f"bdhs: similarity of completions and answers: {similarity.name}{why}"]
    if cfg.mode == "mixed" and cfg.mixed.reward is None:
        _annotator(cfg.mixed.annotator, cfg.mixed.vocabulary)
    return []


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs under the mode; a run is measured on the responses of the data."""
    settings = {"mean": cfg.mean, "rejected": cfg.gamma > 0, "hallucinated": cfg.gamma < 1}
    return replace(
        pair_requirements(cfg, int(cfg.mode == "offline" and cfg.reference is None), settings, compute=precompute),
        decoded_images=cfg.mode == "mixed",  # for the annotator
        reward=cfg.mixed.reward if cfg.mode == "mixed" else None,
        combine=cfg.mixed.combine,
        reward_key="method.mixed.reward",
        measured_by=cfg.model_copy(update={"mode": "offline"}) if cfg.mode != "offline" else None,
        check=partial(check, cfg),
    )


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Return one contrast: pairs with hallucinations from the data or the policy, or pairs that the policy sampled."""
    make = {"offline": _offline, "online": _online, "mixed": _mixed}[cfg.mode]
    contrast: Contrast = make(policy, batch, cfg, rng)
    score = partial(response_scores, policy.family, batch=contrast.batch, views=contrast.views, mean=cfg.mean)
    scores = reference_scores(policy, batch, score)
    # Cached scores cover all views, also those that this batch does not have
    if batch.precomputed is not None and scores is not None:
        scores = {view: scores[view] for view in (*contrast.views, TOKEN)}
    return [replace(contrast, reference=scores)]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """Return the pair losses against the rejected and the hallucinated response, weighted by their shares."""
    cfg = present(cfg, policy.memory)
    batch, reference_scores, shares = contrast.batch, contrast.reference, contrast.shares
    policy_scores = response_scores(policy.family, policy.model, batch, views=contrast.views, mean=cfg.mean)
    terms = None
    if shares is not None:
        rejected, hallucinated = losses_against(cfg, policy_scores, reference_scores, batch, "hallucinated")
        terms = {"rejected loss": shares * rejected, "hallucinated loss": (1 - shares) * hallucinated}
    step = response_step(cfg, policy_scores, reference_scores, batch, terms)
    # Processes sum metrics by name. If only some pairs of the data have a hallucinated response, one process may have
    # such metrics and another none.
    left_out = ("hallucinated", "rejected loss") if cfg.mode == "offline" else ()
    other_metrics = {name: value for name, value in step.metrics.items() if not name.startswith(left_out)}
    return replace(step, metrics=other_metrics, summary=contrast.summary)


def precompute(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Scores:
    """Return the reference's scores; without a hallucinated response the rejected one's score replaces its score."""
    scores = reference_scores_of(contrasts(policy, batch, cfg, rng))
    return {"hallucinated": scores["rejected"], **scores}


# ----------------------------------------------------------------------------------------------- contrasts of the modes


class _Texts(NamedTuple):
    """Responses of a pair; an empty string means no hallucinated response."""

    chosen: str
    rejected: str
    hallucinated: str = ""


def _offline(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """Return the contrast of the data's pairs, with the hallucinated responses that the data have."""
    texts = []
    for pair in batch.pairs:
        # Nothing else is learned from: the hallucinated response is the rejected one
        if cfg.gamma == 0 and pair.hallucinated:
            texts.append(_Texts(pair.chosen, pair.hallucinated))
        else:
            texts.append(_Texts(pair.chosen, pair.rejected, pair.hallucinated if cfg.gamma < 1 else ""))
    return _contrast(policy.family, batch, texts, cfg.gamma, {}, three=any(text.hallucinated for text in texts))


def _online(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """Return the contrast of the pairs with the policy's current completions under a masked image."""
    # Completions of the answerable pairs
    masking, similarity = cfg.online, _similarity(cfg.online.similarity)
    sampler = ResponseSampler(policy.family, policy.unwrapped, rng)
    answerable = _answerable(sampler, batch, masking.max_new_tokens, [True] * len(batch.rows), completing=True)
    with policy.gathered(policy.unwrapped):  # processes generate answers of unequal length
        completions = bdhs(sampler, list(answerable.values()), batch.features, masking, similarity)
    answers = dict(zip(answerable, completions, strict=True))
    # Responses of every pair; with gamma 0 a pair without a usable completion has weight 0
    texts, weights, tries = list[_Texts](), batch.weights.clone(), torch.zeros_like(batch.weights)
    for number, pair in enumerate(batch.pairs):
        completion = answers.get(number, NO_COMPLETION)
        text = "" if completion.text == pair.chosen.strip() else completion.text
        tries[number] = completion.tries
        if cfg.gamma > 0:
            texts.append(_Texts(pair.chosen, pair.rejected, text))
        else:
            texts.append(_Texts(pair.chosen, text or pair.rejected))
            weights[number] *= bool(text)
    summary = {"tries": tries[batch.weights > 0]}
    return _contrast(policy.family, replace(batch, weights=weights), texts, cfg.gamma, summary, three=cfg.gamma > 0)


def _mixed(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """Return the contrast of the pairs, some replaced by two sampled answers that the annotator ranks."""
    mixed = cfg.mixed
    sampler = ResponseSampler(policy.family, policy.unwrapped, rng)
    # Two answers of the policy to a share of the prompts
    is_replaced = (rng.uniform(batch.rows, (), "own pair") < mixed.share).tolist()
    answerable = _answerable(sampler, batch, mixed.max_new_tokens, is_replaced, completing=False)
    rows, parts = list(answerable.values()), [WHOLE] * len(answerable)
    with policy.gathered(policy.unwrapped):
        first, second = (
            [answer.text for answer in sampler.sample(rows, parts, batch.features, mixed, attempt)]
            for attempt in (1, 2)
        )
    # Annotated answers replace the data's responses
    texts = [_Texts(pair.chosen, pair.rejected) for pair in batch.pairs]
    own = torch.zeros_like(batch.weights)
    pairs = zip(answerable, first, second, strict=True)
    distinct = [
        _Sampled(number, text, other_text)
        for number, text, other_text in pairs
        if text and other_text and text != other_text
    ]
    for (number, text, other_text), better in zip(distinct, _preferences(batch, mixed, distinct), strict=True):
        if better:
            texts[number] = _Texts(text, other_text) if better > 0 else _Texts(other_text, text)
            own[number] = 1.0
    return _contrast(policy.family, batch, texts, cfg.gamma, {"own pairs": own[batch.weights > 0]}, three=False)


class _Sampled(NamedTuple):
    """Index of a pair in the batch, and two answers of the policy to its prompt."""

    number: int
    first: str
    second: str


def _preferences(batch: EncodedResponses, mixed: MixedConfig, sampled: Sequence[_Sampled]) -> list[float]:
    """Return a number for each two answers: above 0 if the judge or the annotator prefers the first."""
    pairs = [batch.pairs[one.number] for one in sampled]
    images = [[batch.decoded_images[ref.key] for ref in pair.images] for pair in pairs]
    if mixed.reward is None:
        annotate = _annotator(mixed.annotator, mixed.vocabulary)
        return [
            annotate(pair, shown, one.first, one.second)
            for pair, shown, one in zip(pairs, images, sampled, strict=True)
        ]
    assert batch.judge is not None, "mixed.reward needs a judge of responses"
    # Both answers of all pairs in one call
    answers = [*(one.first for one in sampled), *(one.second for one in sampled)]
    first, second = batch.judge(images * 2, [as_text(pair.turns) for pair in pairs] * 2, answers).chunk(2)
    preferences: list[float] = (first - second).tolist()
    return preferences


def _answerable(
    sampler: ResponseSampler, batch: EncodedResponses, new: int, wanted: Sequence[bool], *, completing: bool
) -> dict[int, GroundTruthAnswer]:
    """Return the pairs to generate for, by index: the wanted ones of nonzero weight that fit the model's length.

    Args:
        sampler: the sampler that answers.
        batch: the pairs.
        new: the number of tokens to generate.
        wanted: whether to generate for each pair [B].
        completing: the model completes the chosen answer instead of starting a new one.
    """
    answers = dict[int, GroundTruthAnswer]()
    for number, pair in enumerate(batch.pairs):
        images = tuple((ref.key, batch.views[ref.key]) for ref in pair.images)
        row = GroundTruthAnswer(batch.rows[number], pair.turns, pair.chosen.strip(), images)
        start = row.answer if completing else ""
        if wanted[number] and batch.weights[number] > 0 and not too_long_reason(sampler, row, start, new):
            answers[number] = row
    return answers


def _contrast(
    family: VisionLanguage,
    batch: EncodedResponses,
    texts: Sequence[_Texts],
    gamma: float,
    summary: dict[str, Tensor],
    *,
    three: bool,
) -> Contrast:
    """Return the contrast of these responses, two or three per pair; an unchanged batch is not tokenized again."""
    if not three and list(texts) == [_Texts(pair.chosen, pair.rejected) for pair in batch.pairs]:
        return Contrast(batch, None, summary, None)
    texts = [_trainable(family, pair, text) for pair, text in zip(batch.pairs, texts, strict=True)]
    rows = [_rows(family, batch, pair, text) for pair, text in zip(batch.pairs, texts, strict=True)]
    device, weights = batch.weights.device, batch.weights.clone()
    for number, row in enumerate(rows):  # responses that differ only after the cut are equal
        if row[0] == row[1]:
            weights[number] = 0.0
    used_rows = rows if three else [row[:2] for row in rows]
    tokens = family.processor.collate([row for view in zip(*used_rows, strict=True) for row in view]).to(device)
    # Preference and margin belong to the data's own two responses
    labels, own = batch.labels, [(text.chosen, text.rejected) for text in texts]
    if labels is not None:
        replaced = [sides != (pair.chosen, pair.rejected) for sides, pair in zip(own, batch.pairs, strict=True)]
        labels = labels.sure(torch.tensor(replaced, device=device))
    # The rejected response has the whole loss if there is no distinct hallucinated one
    further = [bool(text.hallucinated) and row[0] != row[2] for text, row in zip(texts, rows, strict=True)]
    shares = torch.tensor([gamma if one else 1.0 for one in further], device=device) if three else None
    return Contrast(replace(batch, tokens=tokens, weights=weights, labels=labels), shares, summary, None)


def _trainable(family: VisionLanguage, pair: ResponsePair, texts: _Texts) -> _Texts:
    """Return the texts, or those of the pair where the chat template would change one that was generated."""
    problem = family.processor.template_problem(pair.turns, [text for text in texts if text])
    return texts if problem is None else _Texts(pair.chosen, pair.rejected)


def _rows(
    family: VisionLanguage, batch: EncodedResponses, pair: ResponsePair, texts: _Texts
) -> list[TokenizedResponse]:
    """Tokenize the prompt with each of three responses; the rejected one replaces a missing hallucinated one."""

    def rows(refs: Sequence[ImageRef]) -> list[TokenizedResponse]:
        responses = [texts.chosen, texts.rejected, texts.hallucinated or texts.rejected]
        return family.processor.tokenize_responses(
            pair.turns, responses, [(ref.key, batch.views[ref.key]) for ref in refs]
        )

    tokenized = rows(pair.images)
    # The data's own rejected response may have been given for other images
    if texts.rejected == pair.rejected and pair.rejected_images != pair.images:
        tokenized[1] = rows(pair.rejected_images)[1]
    return [cut_tail(row, batch.max_length) for row in tokenized]


# ------------------------------------------------------------------------------------------- similarity and annotators


def _similarity(name: str) -> Similarity:
    return load_similarity("method.online.similarity", name)


@cache
def _annotator(name: str, vocabulary: str) -> Annotator:
    if name != RULES:
        arguments = ("pair", "images", "first", "second")
        return user_function("method.mixed.annotator", name, arguments, "a number", _is_number)
    return partial(fewer_inventions, load_vocabulary("method.mixed.vocabulary", vocabulary))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not math.isnan(value)


def fewer_inventions(
    vocabulary: Vocabulary, pair: ResponsePair, pictures: Sequence[Image.Image], first: str, second: str
) -> float:
    """Compare two answers with the chosen response: fewer contradictions win, then more of its objects.

    This is the bundled annotator. Every mention of an object that the chosen response does not name is a contradiction.
    So is a yes for its no, or a no for its yes.
    """

    def worth(text: str) -> tuple[int, int]:
        mentions = [mention.object for mention in vocabulary.mentions(text)]
        against = sum(name not in true for name in mentions) + contradicts(pair.chosen, text)
        return -against, len(true & set(mentions))

    true = {mention.object for mention in vocabulary.mentions(pair.chosen)}
    first_score, second_score = worth(first), worth(second)
    return float(first_score > second_score) - float(first_score < second_score)
