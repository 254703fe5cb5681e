"""Rejected responses for true answers, one class for each way: BDHS, Re-Align, POVID, and the model's own answers.

Each takes pairs, whose chosen responses are the true answers, some at a time, and makes of each a rejected response, or
says why there is none. What comes out for a pair depends on the pair alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.formats.responses import IMAGE
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.families.types import Decoding, ImageFeatures, ImageView
from mmalign.language.chat import Turn
from mmalign.registry import name_of
from mmalign.synthesis.bdhs import Answered, Hiding, Speaker, bdhs, too_long
from mmalign.synthesis.sentence_cuts import MASK, STOPS, WHOLE, masked_openings
from mmalign.synthesis.similarity import Similarity

Writer = Callable[[ResponsePair], str | None]  # from a pair to another text of its answer; None if there is none


_SAME = "what came out is the true answer"


# Asked of a similar image, with the masked answer after it.
FILL_IN = (
    f"Parts of the text below are covered by {MASK}. Look at the picture, choose words for each {MASK} that fit what "
    "it shows, and write the whole text again with your words in their places. Write nothing else.\n"
)


@dataclass(frozen=True)
class Made:
    """A rejected response.

    Attributes:
        text: what it says.
        notes: how it came about.
        retrieved: another image that it was said of.
    """

    text: str
    notes: Mapping[str, float | str]
    retrieved: ImageRef | None = None


Maker = Callable[[Sequence[ResponsePair]], list[Made | str]]  # a pair's rejected response, or why there is none


class Own:
    """What the model itself answers, as in SPIN (arXiv:2401.01335).

    Args:
        speaker: the model.
        decoding: how it answers.
    """

    def __init__(self, speaker: Speaker, decoding: Decoding) -> None:
        self.speaker, self.decoding = speaker, decoding

    def __call__(self, pairs: Sequence[ResponsePair]) -> list[Made | str]:
        """See Maker."""
        found, rows = _askable(self.speaker, pairs, self.decoding)
        features = _encoded(self.speaker, rows.values())
        texts = self.speaker.says(list(rows.values()), [WHOLE] * len(rows), features, self.decoding, tried=1)
        found |= {number: _made(text, row.answer, {}) for (number, row), text in zip(rows.items(), texts, strict=True)}
        return [found[number] for number in range(len(pairs))]


class Hallucinated:
    """Completions with most of the image hidden.

    Args:
        speaker: the model.
        how: the settings.
        similarity: the measure of what is told apart.
    """

    def __init__(self, speaker: Speaker, how: Hiding, similarity: Similarity) -> None:
        self.speaker, self.how, self.similarity = speaker, how, similarity

    def __call__(self, pairs: Sequence[ResponsePair]) -> list[Made | str]:
        """See Maker."""
        found, rows = _askable(self.speaker, pairs, self.how.decoding, completing=True)
        features = _encoded(self.speaker, rows.values())
        said = bdhs(self.speaker, list(rows.values()), features, self.how, self.similarity)
        for (number, row), one in zip(rows.items(), said, strict=True):
            notes = {"tries": one.tries, "similarity": round(one.similarity, 4)}
            found[number] = _made(one.text, row.answer, notes)
        return [found[number] for number in range(len(pairs))]


class Misled:
    """Answers whose masked parts are filled in from similar images, one after another until one differs enough.

    Args:
        speaker: the model.
        index: the similar images.
        mask: hides parts of an answer.
        decoding: how the model fills them in.
        similarity: the measure of what differs.
        similar: a text this similar to the true answer is not taken.
        asking: ask the model for the whole text with the masks filled in (`FILL_IN`), as the paper does; otherwise let
            it go on from before the first mask of each sentence, after the true words, which needs no model that
            follows instructions.
    """

    def __init__(
        self,
        speaker: Speaker,
        index: Index,
        mask: Writer,
        decoding: Decoding,
        similarity: Similarity,
        *,
        similar: float,
        asking: bool,
    ) -> None:
        self.speaker, self.index, self.mask, self.decoding = speaker, index, mask, decoding
        self.similarity, self.similar, self.asking = similarity, similar, asking

    def __call__(self, pairs: Sequence[ResponsePair]) -> list[Made | str]:
        """See Maker."""
        found: dict[int, Made | str] = {}
        masked: dict[int, str] = {}
        for number, pair in enumerate(pairs):
            text = _text_of(self.mask, pair)
            try:
                self._require(pair, text)
            except ValueError as error:
                found[number] = _why(pair, error)
            else:
                masked[number] = text
        why = dict[int, str]()
        for tried in range(1, self.index.candidates + 1):
            left = [number for number in masked if number not in found]
            found |= self._try(pairs, masked, left, tried, why)
        none = f"of no similar image something is said that is less similar than {self.similar:g}"
        return [found.get(number, why.get(number, none)) for number in range(len(pairs))]

    def _require(self, pair: ResponsePair, masked: str) -> None:
        """Refuse a pair that cannot be used, or whose answer is not masked as it should be."""
        if len(pair.images) != 1:
            raise ValueError(f"has {len(pair.images)} images; expected one, which another can take the place of")
        if not self.index.similar(pair.images[0]):
            raise ValueError(self.index.bad.get(pair.images[0].key, "there is no other image"))
        if MASK not in masked:
            raise ValueError("nothing of the answer is masked")
        masked_openings(pair.chosen.strip(), masked)  # raises where more than words was replaced

    def _try(
        self,
        pairs: Sequence[ResponsePair],
        masked: Mapping[int, str],
        left: Iterable[int],
        tried: int,
        why: dict[int, str],
    ) -> dict[int, Made | str]:
        """What is taken of what the model says of the images of this rank; `why` gets to know which cannot be shown."""
        rows: dict[int, tuple[Answered, ImageRef]] = {}
        for number in left:
            others = self.index.similar(pairs[number].images[0])
            if len(others) < tried:
                continue
            pair = pairs[number]
            if self.asking:
                pair = replace(pair, turns=(Turn("user", f"{IMAGE}\n{FILL_IN}{masked[number]}"),))
            try:
                start = "" if self.asking else pair.chosen
                row = _answered(self.speaker, pair, others[tried - 1 : tried], start, self.decoding)
            except ValueError as error:  # of this image and prompt; the next one may do
                why[number] = _why(pair, error)
                continue
            rows[number] = row, others[tried - 1]
        if not rows:
            return {}
        asked = [row for row, _ in rows.values()]
        features = _encoded(self.speaker, asked)
        parts = [WHOLE if self.asking else masked_openings(rows[n][0].answer, masked[n]) for n in rows]
        decoding = replace(self.decoding, stop=() if self.asking else STOPS)
        texts = self.speaker.says(asked, parts, features, decoding, tried)
        scores = self.similarity(texts, [row.answer for row in asked])
        found = dict[int, Made | str]()
        for (number, (row, ref)), text, score in zip(rows.items(), texts, scores, strict=True):
            notes: dict[str, float | str] = {"tries": tried, "similarity": round(score, 4), "masked": masked[number]}
            made = _made(text, row.answer, notes)
            if isinstance(made, Made) and score < self.similar and MASK not in text:
                found[number] = replace(made, retrieved=ref)
        return found


class Corrupted:
    """Answers of which a function of one's own, or of the rules, changes some words.

    Args:
        write: changes them.
    """

    def __init__(self, write: Writer) -> None:
        self.write = write

    def __call__(self, pairs: Sequence[ResponsePair]) -> list[Made | str]:
        """See Maker."""
        return [_made(_text_of(self.write, pair), pair.chosen.strip(), {}) for pair in pairs]


class Index:
    """For every image of some pairs those most like it.

    Attributes:
        candidates: how many, where there are so many.
        bad: why an image cannot be used, by its key.

    Args:
        pairs: whose images.
        embed: makes unit vectors [N, E] of images.
        candidates: how many similar ones are asked for.
        batch_size: images embedded at a time.
    """

    def __init__(
        self,
        pairs: Iterable[ResponsePair],
        embed: Callable[[Sequence[Image.Image]], Tensor],
        candidates: int,
        batch_size: int = 64,
    ) -> None:
        self.candidates, self.bad = candidates, dict[str, str]()
        refs = list({ref.key: ref for pair in pairs for ref in pair.images}.values())
        vectors, self._refs, some = list[Tensor](), list[ImageRef](), list[Image.Image]()
        for number, ref in enumerate(refs, start=1):
            try:
                some.append(decode(ref))
                self._refs.append(ref)
            except BadImage as error:
                self.bad[ref.key] = str(error)
            if some and (len(some) == batch_size or number == len(refs)):
                vectors.append(embed(some).cpu())
                some = []
        self._places = {ref.key: place for place, ref in enumerate(self._refs)}
        self._nearest = nearest(torch.cat(vectors), candidates) if vectors else []

    def similar(self, ref: ImageRef) -> list[ImageRef]:
        """The images most like this one, the most similar first; none for one that cannot be read."""
        place = self._places.get(ref.key)
        return [] if place is None else [self._refs[other] for other in self._nearest[place]]


def _askable(
    speaker: Speaker, pairs: Sequence[ResponsePair], decoding: Decoding, *, completing: bool = False
) -> tuple[dict[int, Made | str], dict[int, Answered]]:
    """By a pair's number: why it cannot be asked, or its prompt, its images and its answer.

    Args:
        speaker: the model.
        pairs: of true answers.
        decoding: how much the model will say.
        completing: it will go on from the true answer, not answer anew.
    """
    bad, rows = dict[int, Made | str](), dict[int, Answered]()
    for number, pair in enumerate(pairs):
        try:
            rows[number] = _answered(speaker, pair, pair.images, pair.chosen if completing else "", decoding)
        except ValueError as error:
            bad[number] = _why(pair, error)
    return bad, rows


def _encoded(speaker: Speaker, rows: Iterable[Answered]) -> ImageFeatures:
    """The rows' images, each encoded once."""
    return speaker.family.encode_images({key: view for row in rows for key, view in row.images})


def _answered(
    speaker: Speaker, pair: ResponsePair, images: Sequence[ImageRef], start: str, decoding: Decoding
) -> Answered:
    """A pair's prompt and true answer with these images, which the model can take, and say enough after `start`.

    Raises:
        ValueError: an image is bad, or the prompt is too long or does not fit its images.
    """
    views = list[tuple[str, ImageView]]()
    for ref in images:
        views.append((ref.key, speaker.family.reader.view(decode(ref))))
    row = Answered(pair.row, pair.turns, pair.chosen.strip(), tuple(views))
    why = too_long(speaker, row, start, decoding.max_new_tokens)
    if why:
        raise ValueError(why)
    return row


def _why(pair: ResponsePair, error: ValueError) -> str:
    """What an error says; whoever reads it knows which pair it is about."""
    return str(error).removeprefix(f"{pair.where}, ")


def _made(text: str, answer: str, notes: Mapping[str, float | str]) -> Made | str:
    """A rejected response, or why it is none."""
    text = text.strip()
    if not text:
        return "nothing came out"
    return _SAME if text == answer else Made(text, notes)


def _text_of(write: Writer, pair: ResponsePair) -> str:
    """What a function makes of a pair's answer.

    Raises:
        ValueError: something else than text.
    """
    text = write(pair)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"prepare: {name_of(write)} gives a {type(text).__name__}; expected text, or nothing")
    return text


COPY = 1 - 1e-5  # two images with this cosine are one under two names


ROWS = 1024  # of the table of cosines that are in memory at once


def nearest(vectors: Tensor, number: int) -> list[list[int]]:
    """For each image those most like it, the most alike first; neither itself nor a copy of it.

    Args:
        vectors: [N, E], of length 1.
        number: how many, where there are so many.
    """
    found: list[list[int]] = []
    for first in range(0, len(vectors), ROWS):
        some = vectors[first : first + ROWS]
        cosines = some @ vectors.T
        best = cosines.masked_fill(cosines >= COPY, -torch.inf).topk(min(number, len(vectors)))
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            ranked = sorted(zip(values, places, strict=True), key=lambda one: (-one[0], one[1]))
            found.append([place for value, place in ranked if value > -torch.inf])
    return found
