"""Generators of rejected responses for true answers: BDHS, Re-Align, POVID, and the model's own answers.

Each generator takes a batch of pairs whose chosen responses are the true answers. It returns a rejected response for
each pair, or a reason why there is none. A pair's result depends on that pair alone. `several_generated` takes prompts
alone and returns candidates, which a judge ranks afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from mmalign.config import BdhsConfig, DecodingConfig
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.families.types import ImageFeatures
from mmalign.language.chat import IMAGE, Turn
from mmalign.registry import qualified_name
from mmalign.synthesis.bdhs import GroundTruthAnswer, ResponseSampler, bdhs, too_long_reason
from mmalign.synthesis.sentence_cuts import MASK, STOPS, WHOLE, masked_openings
from mmalign.synthesis.similarity import Similarity

EMBEDDED = 64  # images that are embedded at a time
CUT = "cut at max_new_tokens"  # note on a text that lost its torn last sentence
CUT_REASON = f"the completion has no whole sentence, {CUT}; raise that"
Writer = Callable[[ResponsePair], str | None]  # from a pair to a changed text of its answer; None if there is none


# Prompt about a similar image; the masked answer follows it.
FILL_IN = (
    f"Parts of the text below are covered by {MASK}. Look at the picture, choose words for each {MASK} that fit what "
    "it shows, and write the whole text again with your words in their places. Write nothing else.\n"
)


@dataclass(frozen=True)
class RejectedResponse:
    """A rejected response, notes on its generation, and the other image that it describes; None for the pair's own."""

    text: str
    metadata: Mapping[str, float | str]
    retrieved: ImageRef | None = None


@dataclass(frozen=True)
class Candidates:
    """Two or more different answers to one prompt, in the order of generation, and notes on their generation."""

    texts: Sequence[str]
    metadata: Mapping[str, float | str]


# For each pair a rejected response or candidates, or a reason why there is none
ResponseGenerator = Callable[[Sequence[ResponsePair]], Sequence[RejectedResponse | Candidates | str]]


def self_generated(
    sampler: ResponseSampler, decoding: DecodingConfig, pairs: Sequence[ResponsePair]
) -> list[RejectedResponse | str]:
    """Generate the model's own answers, as in SPIN (arXiv:2401.01335)."""

    def answer(rows: Sequence[GroundTruthAnswer], features: ImageFeatures) -> list[RejectedResponse]:
        answers = sampler.sample(rows, [WHOLE] * len(rows), features, decoding, attempt=1)
        return [RejectedResponse(text, {CUT: True} if is_cut else {}) for text, is_cut, _ in answers]

    return _respond(sampler, pairs, decoding.max_new_tokens, answer)


def several_generated(
    sampler: ResponseSampler, decoding: DecodingConfig, number: int, pairs: Sequence[ResponsePair]
) -> list[Candidates | str]:
    """Generate a number of the model's own answers to each prompt, and leave out empty and repeated ones."""
    rows, bad = _usable(sampler, pairs, decoding.max_new_tokens)
    results, features = dict[int, Candidates | str](bad), _encoded(sampler, rows.values())
    # Attempts differ in the keys of their random draws
    answers = [
        sampler.sample(list(rows.values()), [WHOLE] * len(rows), features, decoding, attempt)
        for attempt in range(1, number + 1)
    ]
    # The different answers of each row, or the reason why there are too few
    for row, candidates in zip(rows, zip(*answers, strict=True), strict=True):
        texts = list(dict.fromkeys(filter(None, (answer.text.strip() for answer in candidates))))
        num_cut = sum(answer.is_cut for answer in candidates)
        same = f"has {len(texts)} different answers of {number}; raise prepare.judged.temperature"
        reason = CUT_REASON if num_cut and not texts else same
        results[row] = Candidates(texts, {CUT: num_cut} if num_cut else {}) if len(texts) > 1 else reason
    return [results[row] for row in range(len(pairs))]


def hallucinated(
    sampler: ResponseSampler, masking: BdhsConfig, similarity: Similarity, pairs: Sequence[ResponsePair]
) -> list[RejectedResponse | str]:
    """Generate completions of the true answers with most of the image hidden (BDHS)."""

    def complete(rows: Sequence[GroundTruthAnswer], features: ImageFeatures) -> list[RejectedResponse]:
        completions = bdhs(sampler, rows, features, masking, similarity)
        return [
            RejectedResponse(
                c.text, {"tries": c.tries, "similarity": round(c.similarity, 4), **({CUT: True} if c.is_cut else {})}
            )
            for c in completions
        ]

    return _respond(sampler, pairs, masking.max_new_tokens, complete, completing=True)


def rule_corrupted(write: Writer, pairs: Sequence[ResponsePair]) -> list[RejectedResponse | str]:
    """Return answers in which the rules, or a function of the user, changed some words."""
    return [_checked(RejectedResponse(_text_of(write, pair), {}), pair.chosen.strip()) for pair in pairs]


@dataclass(frozen=True)
class ReAlign:
    """Generator that fills the masked parts of an answer from similar images, in turn until a text differs enough.

    Attributes:
        sampler: the model.
        index: the similar images.
        mask: a function that hides parts of an answer.
        decoding: the decoding settings.
        similarity: the measure that compares a text with the true answer.
        max_similarity: the similarity to the true answer from which a text is rejected.
        asking: True asks the model for the whole text with the masks filled in (`FILL_IN`), as the paper does. False
            lets it continue each sentence from before the first mask, after the true words, which needs no
            instruction-following model.
    """

    sampler: ResponseSampler
    index: ImageIndex
    mask: Writer
    decoding: DecodingConfig
    similarity: Similarity
    max_similarity: float
    asking: bool

    def __call__(self, pairs: Sequence[ResponsePair]) -> list[RejectedResponse | str]:
        """Generate a rejected response for each pair, or return a reason why there is none."""
        # Masked answers of the usable pairs
        results: dict[int, RejectedResponse | str] = {}
        masked: dict[int, str] = {}
        for number, pair in enumerate(pairs):
            text = _text_of(self.mask, pair)
            try:
                self._require(pair, text)
            except ValueError as error:
                results[number] = _error_text(pair, error)
            else:
                masked[number] = text
        # One similar image per attempt, for the pairs that have no accepted response
        why = dict[int, str]()
        for attempt in range(1, self.index.candidates + 1):
            left = [number for number in masked if number not in results]
            results |= self._try(pairs, masked, left, attempt, why)
        none = f"no similar image has an answer less similar than {self.max_similarity:g}"
        return [results.get(number, why.get(number, none)) for number in range(len(pairs))]

    def _require(self, pair: ResponsePair, masked: str) -> None:
        """Refuse a pair without exactly one image, without a similar image, or with an answer masked wrongly."""
        if len(pair.images) != 1:
            raise ValueError(f"has {len(pair.images)} images; expected one, to be replaced")
        if not self.index.similar(pair.images[0]):
            raise ValueError(self.index.bad.get(pair.images[0].key, "there is no other image"))
        if MASK not in masked:
            raise ValueError("nothing of the answer is masked")
        masked_openings(pair.chosen.strip(), masked)  # raises if the masking changed the number of sentences

    def _try(
        self,
        pairs: Sequence[ResponsePair],
        masked: Mapping[int, str],
        left: Iterable[int],
        attempt: int,
        why: dict[int, str],
    ) -> dict[int, RejectedResponse | str]:
        """Return the accepted responses to similar images of rank `attempt`; record in `why` the unusable ones."""
        # Prompts with the similar image of this rank
        rows: dict[int, tuple[GroundTruthAnswer, ImageRef]] = {}
        for number in left:
            others = self.index.similar(pairs[number].images[0])
            if len(others) < attempt:
                continue
            pair = pairs[number]
            if self.asking:
                pair = replace(pair, turns=(Turn("user", f"{IMAGE}\n{FILL_IN}{masked[number]}"),))
            try:
                start = "" if self.asking else pair.chosen
                row = _ground_truth_answer(
                    self.sampler, pair, others[attempt - 1 : attempt], start, self.decoding.max_new_tokens
                )
            except ValueError as error:  # only this image is unusable; the next one may fit
                why[number] = _error_text(pair, error)
                continue
            rows[number] = row, others[attempt - 1]
        if not rows:
            return {}
        # Answers about these images
        rows_asked = [row for row, _ in rows.values()]
        features = _encoded(self.sampler, rows_asked)
        parts = [WHOLE if self.asking else masked_openings(rows[n][0].answer, masked[n]) for n in rows]
        stop = () if self.asking else STOPS
        answers = self.sampler.sample(rows_asked, parts, features, self.decoding, attempt, stop=stop)
        scores = self.similarity([answer.text for answer in answers], [row.answer for row in rows_asked])
        # Accepted: other than the true answer, dissimilar enough, and without a mask left
        results = dict[int, RejectedResponse | str]()
        for (number, (row, ref)), (text, is_cut, _), score in zip(rows.items(), answers, scores, strict=True):
            notes: dict[str, float | str] = {"tries": attempt, "similarity": round(score, 4), "masked": masked[number]}
            notes |= {CUT: True} if is_cut else {}
            result = _checked(RejectedResponse(text, notes, ref), row.answer)
            if isinstance(result, RejectedResponse) and score < self.max_similarity and MASK not in text:
                results[number] = result
        return results


class ImageIndex:
    """Index of each image's nearest neighbours among the images of some pairs.

    `embed` maps images to unit vectors [N, E]. `bad` has the reason why an image is unusable, by its key.
    """

    def __init__(
        self, pairs: Iterable[ResponsePair], embed: Callable[[Sequence[Image.Image]], Tensor], candidates: int
    ) -> None:
        self.candidates, self.bad = candidates, dict[str, str]()
        # Distinct images, embedded in batches, without those that cannot be read
        refs = list({ref.key: ref for pair in pairs for ref in pair.images}.values())
        vectors, self._refs, batch = list[Tensor](), list[ImageRef](), list[Image.Image]()
        for number, ref in enumerate(refs, start=1):
            try:
                batch.append(decode(ref))
                self._refs.append(ref)
            except BadImage as error:
                self.bad[ref.key] = str(error)
            if batch and (len(batch) == EMBEDDED or number == len(refs)):
                vectors.append(embed(batch).cpu())
                batch = []
        # Row of each image in the vectors, and the nearest others
        self._places = {ref.key: place for place, ref in enumerate(self._refs)}
        self._nearest = nearest(torch.cat(vectors), candidates) if vectors else []

    def similar(self, ref: ImageRef) -> list[ImageRef]:
        """Return the images most similar to this one, most similar first; empty if it cannot be read."""
        place = self._places.get(ref.key)
        return [] if place is None else [self._refs[other] for other in self._nearest[place]]


def _respond(
    sampler: ResponseSampler,
    pairs: Sequence[ResponsePair],
    num_tokens: int,
    generate: Callable[[Sequence[GroundTruthAnswer], ImageFeatures], list[RejectedResponse]],
    *,
    completing: bool = False,
) -> list[RejectedResponse | str]:
    """Generate a response of `num_tokens` new tokens to every usable pair; return it, or the reason why there is none.

    `completing`: the model continues the true answer instead of answering from the start.
    """
    rows, bad = _usable(sampler, pairs, num_tokens, completing=completing)
    results = dict[int, RejectedResponse | str](bad)
    responses = generate(list(rows.values()), _encoded(sampler, rows.values()))
    for (number, row), response in zip(rows.items(), responses, strict=True):
        results[number] = _checked(response, row.answer)
    return [results[number] for number in range(len(pairs))]


def _usable(
    sampler: ResponseSampler, pairs: Sequence[ResponsePair], num_tokens: int, *, completing: bool = False
) -> tuple[dict[int, GroundTruthAnswer], dict[int, str]]:
    """Return the prompts of usable pairs by their numbers, and the reasons why the others are unusable."""
    rows, bad = dict[int, GroundTruthAnswer](), dict[int, str]()
    for number, pair in enumerate(pairs):
        try:
            start = pair.chosen if completing else ""
            rows[number] = _ground_truth_answer(sampler, pair, pair.images, start, num_tokens)
        except ValueError as error:
            bad[number] = _error_text(pair, error)
    return rows, bad


def _encoded(sampler: ResponseSampler, rows: Iterable[GroundTruthAnswer]) -> ImageFeatures:
    """Encode each of the rows' images once."""
    return sampler.family.encode_images({key: view for row in rows for key, view in row.images})


def _ground_truth_answer(
    sampler: ResponseSampler, pair: ResponsePair, images: Sequence[ImageRef], start: str, num_tokens: int
) -> GroundTruthAnswer:
    """Return a pair's prompt and true answer with these images, checked to leave room for new tokens after `start`.

    Raises:
        ValueError: an image is bad, the prompt is too long, or its placeholders do not match its images.
    """
    views = tuple((ref.key, sampler.family.processor.preprocess_image(decode(ref))) for ref in images)
    row = GroundTruthAnswer(pair.row, pair.turns, pair.chosen.strip(), views)
    why = too_long_reason(sampler, row, start, num_tokens)
    if why:
        raise ValueError(why)
    return row


def _error_text(pair: ResponsePair, error: ValueError) -> str:
    """Return an error's message without the pair's location, which the caller adds."""
    return str(error).removeprefix(f"{pair.location}, ")


def _checked(response: RejectedResponse, answer: str) -> RejectedResponse | str:
    """Return a response without white space around it, or a reason why it is unusable."""
    response = replace(response, text=response.text.strip())
    if not response.text:
        return CUT_REASON if CUT in response.metadata else "the completion is empty"
    return "the completion is the true answer" if response.text == answer else response


def _text_of(write: Writer, pair: ResponsePair) -> str:
    """Return a function's text for a pair's answer; empty if the function returns None.

    Raises:
        ValueError: the function returned something other than text or None.
    """
    text = write(pair)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"prepare: {qualified_name(write)} gives a {type(text).__name__}; expected text, or nothing")
    return text


COPY = 1 - 1e-5  # from this cosine on, two images are copies
ROWS = 1024  # rows of the cosine matrix in memory at once


def nearest(vectors: Tensor, number: int) -> list[list[int]]:
    """Return the places of the nearest neighbours of unit vectors [N, E], nearest first, without itself and copies."""
    neighbours: list[list[int]] = []
    for block in torch.split(vectors, ROWS):
        cosines = block @ vectors.T
        # The image itself and its copies are left out; equal cosines come in the order of places
        best = cosines.masked_fill(cosines >= COPY, -torch.inf).topk(min(number, len(vectors)))
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            ranked = sorted(zip(values, places, strict=True), key=lambda neighbour: (-neighbour[0], neighbour[1]))
            neighbours.append([place for value, place in ranked if value > -torch.inf])
    return neighbours
