"""BDHS (arXiv:2407.02477, Algorithm 1 and eq. 5): prefer the true answer to what the model says where it is blind.

    score(y) = sum_t log p(y_t | image, prompt, y_<t)                           for policy and reference
    loss = gamma * -log sigma(beta * (chosen against rejected))                 the data's own rejected response
           + (1 - gamma) * -log sigma(beta * (chosen against hallucinated))     eq. 5

`hallucinated` is a completion of the chosen response with most of the image's tokens hidden (`mmalign.synthesis.bdhs`).

offline  It is in the data, as `mmalign prepare` writes it: as the rejected response itself, which makes this `dpo`, or
         beside a rejected response of the data's own, in the column `hallucinated`.
online   The policy writes it anew for every batch. `gamma: 0` leaves the data's own rejected responses out.
mixed    Mixed-DPO (eq. 4): each pair is, with probability `share`, given up for two answers that the policy samples
         and an annotator orders.

The image's tokens are hidden while the model writes, never while it is scored. A pair for which nothing of use was
written keeps what the data have for it. Processes share no work while they write, so that one may try oftener than
another; each makes one contrast of every batch.

3B rows: chosen, rejected and hallucinated; or the first two alone. See `dpo` for the pair losses that may stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.config import BdhsConfig, Section
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.families.types import Decoding
from mmalign.language.objects import Vocabulary
from mmalign.language.tokens import TokenizedResponse, cut_tail
from mmalign.language.vocabularies import load_vocabulary
from mmalign.methods import Requirements, Step, cached_scores, reference_scores, reference_scores_of
from mmalign.methods._pair_loss import bound_loss
from mmalign.methods.vision_language._responses import (
    PAIR,
    TOKEN,
    ResponseLossConfig,
    pair_loss_against,
    response_scores,
    response_step,
)
from mmalign.policy import Policy, Scores
from mmalign.registry import import_callable
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import (
    Completion,
    GroundTruthAnswer,
    ResponseSampler,
    bdhs,
    masking_config,
    require_image_masking,
    too_long_reason,
)
from mmalign.synthesis.sentence_cuts import WHOLE, contradicts
from mmalign.synthesis.similarity import Similarity, is_fallback, load_similarity

modality = "vision_language"

VIEWS = (*PAIR, "hallucinated")
RULES = "rules"
NO_COMPLETION = Completion("", 0, 0.0)
# From a pair, its pictures, and two answers, which is better: above 0 the first, below 0 the second, 0 if neither is.
Annotator = Callable[[ResponsePair, Sequence[Image.Image], str, str], float]


class Mixed(Section):
    """Pairs that the policy writes and an annotator orders."""

    share: float = Field(0.5, ge=0, le=1, description="how likely a pair of the data is given up for one of these")
    annotator: str = Field(
        RULES,
        description="rules, or module:function, from a pair, its pictures and two answers to a number above 0 if the "
        "first is better, below 0 if the second is",
    )
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")
    temperature: float = Field(1.0, gt=0, description="of the answers")
    max_new_tokens: int = Field(256, ge=1, description="of an answer")
    batch_size: int = Field(16, ge=1, description="answers written at a time")


class Config(ResponseLossConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["bdhs"] = "bdhs"
    beta: float = Field(0.1, gt=0, description="in nats: of a response, or with loss: ipo of a token")
    mode: Literal["offline", "online", "mixed"] = "offline"
    gamma: float = Field(
        0.5, ge=0, le=1, description="the rejected response's share, where there is a hallucinated one beside it"
    )
    online: BdhsConfig = BdhsConfig()
    mixed: Mixed = Mixed()

    @model_validator(mode="after")
    def _of_its_mode(self) -> Config:
        for mode, default in (("online", BdhsConfig()), ("mixed", Mixed())):
            if mode != self.mode and getattr(self, mode) != default:
                raise ValueError(f"mode {self.mode} takes no settings of {mode!r}; leave them out")
        if self.mode == "mixed" and self.gamma != type(self).model_fields["gamma"].default:
            raise ValueError("mode mixed has one rejected response for each pair and takes no gamma; leave it out")
        if self.mode == "online" and self.gamma == 1:
            raise ValueError("mode online with gamma 1 learns from nothing that is written; use mode: offline")
        return self


@dataclass(frozen=True)
class Contrast:
    """Two or three responses to every prompt, and how the reference scores them.

    Attributes:
        batch: [2B] rows, or with hallucinated responses [3B].
        shares: [B], of the rejected response in the loss; None where the batch has no hallucinated ones.
        metrics: [B] each, how the responses came about.
        reference: the reference's scores.
    """

    batch: EncodedResponses
    shares: Tensor | None
    metrics: dict[str, Tensor]
    reference: Scores | None

    @property
    def views(self) -> tuple[str, ...]:
        """The responses that there are of each pair."""
        return PAIR if self.shares is None else VIEWS


def check(cfg: Config) -> list[str]:
    """What people should know before a run; what is missing is said here, before a model is loaded.

    Raises:
        ValueError: a similarity model, a vocabulary or an annotator is not there.
    """
    if cfg.mode == "online":
        similarity = _similarity(cfg.online.similarity)
        fallback = is_fallback(cfg.online.similarity, similarity)
        why = ", since no sentence-transformers model is installed" if fallback else ""
        return [f"bdhs: completions and answers are compared by {similarity.name}{why}"]
    if cfg.mode == "mixed":
        _annotator(cfg.mixed.annotator, cfg.mixed.vocabulary)
    return []


def requirements(cfg: Config) -> Requirements:
    """State what the method needs."""
    settings = {"mean": cfg.loss == "ipo", "rejected": cfg.gamma > 0, "hallucinated": cfg.gamma < 1}
    return Requirements(
        decoded_images=cfg.mode == "mixed",  # for the annotator
        precompute=cached_scores(1 if cfg.mode == "offline" else 0, settings, compute=precompute),
        check=partial(check, cfg),
    )


def contrasts(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Any, rng: KeyedRNG) -> list[Contrast]:
    """One contrast: the pairs with what is hallucinated in the data, or by the policy, or pairs of the policy's own."""
    make = {"offline": _offline, "online": _online, "mixed": _mixed}[cfg.mode]
    contrast: Contrast = make(policy, batch, cfg, rng)
    score = partial(response_scores, policy.family, batch=contrast.batch, views=contrast.views, mean=cfg.loss == "ipo")
    scores = reference_scores(policy, batch, score)
    if batch.precomputed is not None and scores is not None:
        scores = {view: scores[view] for view in (*contrast.views, TOKEN)}
    return [replace(contrast, reference=scores)]


def loss(policy: Policy[VisionLanguage], contrast: Contrast, cfg: Config) -> Step:
    """The pair losses against both other responses, by their shares."""
    batch, reference_scores, link, shares = contrast.batch, contrast.reference, bound_loss(cfg), contrast.shares
    assert reference_scores is not None, "bdhs needs a reference"
    policy_scores = response_scores(policy.family, policy.model, batch, views=contrast.views, mean=cfg.loss == "ipo")
    terms = None
    if shares is not None:
        rejected, hallucinated = (pair_loss_against(link, policy_scores, reference_scores, view) for view in VIEWS[1:])
        terms = {"rejected loss": shares * rejected, "hallucinated loss": (1 - shares) * hallucinated}
    step = response_step(cfg, policy_scores, reference_scores, batch, terms)
    # Processes add up their numbers by name, and of data in which only some pairs have a hallucinated response, one
    # process may have some in its batch and another none.
    left_out = ("hallucinated", "rejected loss") if cfg.mode == "offline" else ()
    other_metrics = {name: value for name, value in step.metrics.items() if not name.startswith(left_out)}
    return replace(step, metrics={**other_metrics, **contrast.metrics})


def precompute(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Any, rng: KeyedRNG) -> Scores:
    """The reference's scores; the rejected response's stands in for that of a hallucinated one that there is not."""
    scores = reference_scores_of(contrasts(policy, batch, cfg, rng))
    return {"hallucinated": scores["rejected"], **scores}


# ---------------------------------------------------------------------------------------------------- what is compared


class _Texts(NamedTuple):
    """The responses of a pair; an empty hallucinated one stands for none."""

    chosen: str
    rejected: str
    hallucinated: str = ""


def _offline(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """The pairs as they are, and where the data have them, the hallucinated responses."""
    texts = []
    for pair in batch.pairs:
        if cfg.gamma == 0 and pair.hallucinated:
            texts.append(_Texts(pair.chosen, pair.hallucinated))
        else:
            texts.append(_Texts(pair.chosen, pair.rejected, pair.hallucinated if cfg.gamma < 1 else ""))
    return _contrast(policy.family, batch, texts, cfg.gamma, {}, three=any(text.hallucinated for text in texts))


def _online(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """The pairs, and what the policy now says with the image hidden."""
    require_image_masking(policy.family)
    masking, similarity = masking_config(cfg.online), _similarity(cfg.online.similarity)
    sampler = ResponseSampler(policy.family, policy.unwrapped, rng)
    answerable = _answerable(sampler, batch, masking.decoding.max_new_tokens, [True] * len(batch.rows), completing=True)
    completions = bdhs(sampler, list(answerable.values()), batch.features, masking, similarity)
    answers = dict(zip(answerable, completions, strict=True))
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
    metrics = {"tries": tries}
    return _contrast(policy.family, replace(batch, weights=weights), texts, cfg.gamma, metrics, three=cfg.gamma > 0)


def _mixed(policy: Policy[VisionLanguage], batch: EncodedResponses, cfg: Config, rng: KeyedRNG) -> Contrast:
    """The pairs, some of them given up for two answers of the policy's that the annotator tells apart."""
    mixed = cfg.mixed
    annotate = _annotator(mixed.annotator, mixed.vocabulary)
    sampler = ResponseSampler(policy.family, policy.unwrapped, rng)
    is_replaced = (rng.uniform(batch.rows, (), "own pair") < mixed.share).tolist()
    answerable = _answerable(sampler, batch, mixed.max_new_tokens, is_replaced, completing=False)
    decoding = Decoding(mixed.max_new_tokens, mixed.temperature, batch_size=mixed.batch_size)
    rows, parts = list(answerable.values()), [WHOLE] * len(answerable)
    first, second = (sampler.sample(rows, parts, batch.features, decoding, attempt) for attempt in (1, 2))
    texts = [_Texts(pair.chosen, pair.rejected) for pair in batch.pairs]
    own = torch.zeros_like(batch.weights)
    for number, one, other in zip(answerable, first, second, strict=True):
        pair = batch.pairs[number]
        images = [batch.decoded_images[ref.key] for ref in pair.images]
        better = annotate(pair, images, one, other) if one and other and one != other else 0.0
        if better:
            texts[number] = _Texts(one, other) if better > 0 else _Texts(other, one)
            own[number] = 1.0
    return _contrast(policy.family, batch, texts, cfg.gamma, {"own pairs": own}, three=False)


def _answerable(
    sampler: ResponseSampler, batch: EncodedResponses, new: int, wanted: Sequence[bool], *, completing: bool
) -> dict[int, GroundTruthAnswer]:
    """The pairs of a batch, by their number, that a model is asked to answer anew: those that count and fit."""
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
    metrics: dict[str, Tensor],
    *,
    three: bool,
) -> Contrast:
    """The batch with these responses, two or three of each pair; where they are its own two, as it is."""
    if not three and list(texts) == [_Texts(pair.chosen, pair.rejected) for pair in batch.pairs]:
        return Contrast(batch, None, metrics, None)
    rows = [_rows(family, batch, pair, text) for pair, text in zip(batch.pairs, texts, strict=True)]
    device, weights = batch.weights.device, batch.weights.clone()
    for number, row in enumerate(rows):  # a difference that begins after the last token that is read is none
        if row[0] == row[1]:
            weights[number] = 0.0
    used_rows = rows if three else [row[:2] for row in rows]
    tokens = family.processor.collate([row for view in zip(*used_rows, strict=True) for row in view]).to(device)
    further = [bool(text.hallucinated) and row[0] != row[2] for text, row in zip(texts, rows, strict=True)]
    shares = torch.tensor([gamma if one else 1.0 for one in further], device=device) if three else None
    return Contrast(replace(batch, tokens=tokens, weights=weights), shares, metrics, None)


def _rows(
    family: VisionLanguage, batch: EncodedResponses, pair: ResponsePair, texts: _Texts
) -> list[TokenizedResponse]:
    """The prompt with each of three responses, tokenised together; the rejected one stands in for a missing third."""

    def rows(refs: Sequence[ImageRef]) -> list[TokenizedResponse]:
        responses = [texts.chosen, texts.rejected, texts.hallucinated or texts.rejected]
        return family.processor.tokenize_responses(
            pair.turns, responses, [(ref.key, batch.views[ref.key]) for ref in refs]
        )

    tokenized = rows(pair.images)
    if texts.rejected == pair.rejected and pair.rejected_images != pair.images:
        tokenized[1] = rows(pair.rejected_images)[1]
    return [cut_tail(row, batch.max_length) for row in tokenized]


# --------------------------------------------------------------------------------------------------- what is looked up


def _similarity(name: str) -> Similarity:
    return load_similarity("method.online.similarity", name)


@cache
def _annotator(name: str, vocabulary: str) -> Annotator:
    if name != RULES:
        return import_callable("method.mixed.annotator", name)
    return partial(fewer_inventions, load_vocabulary("method.mixed.vocabulary", vocabulary))


def fewer_inventions(
    vocabulary: Vocabulary, pair: ResponsePair, pictures: Sequence[Image.Image], first: str, second: str
) -> float:
    """The bundled annotator: better is what says less against the chosen response, then what says more of it.

    Against it are objects that it does not name, each as often as it is named, and yes for its no or no for its yes.
    """

    def worth(text: str) -> tuple[int, int]:
        mentions = [mention.object for mention in vocabulary.mentions(text)]
        against = sum(name not in true for name in mentions) + contradicts(pair.chosen, text)
        return -against, len(true & set(mentions))

    true = {mention.object for mention in vocabulary.mentions(pair.chosen)}
    first_score, second_score = worth(first), worth(second)
    return float(first_score > second_score) - float(first_score < second_score)
