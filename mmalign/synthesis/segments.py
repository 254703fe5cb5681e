"""The parts of an answer that say what is in a picture: objects, colours, numbers and relations, found by rule.

They are what Re-Align hides from a model and what the rules for POVID change. Objects are a vocabulary's; the other
words are few and unambiguous, since a word that is missed does less harm than one that is taken for what it is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from mmalign.language.objects import Vocabulary
from mmalign.synthesis.sentence_cuts import MASK

Kind = Literal["object", "colour", "number", "relation", "verdict"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "grey")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Each relation with what is said in its place: its opposite where it has one.
RELATIONS: dict[str, tuple[str, ...]] = {
    "on top of": ("underneath", "next to"),
    "in front of": ("behind",),
    "to the left of": ("to the right of",),
    "to the right of": ("to the left of",),
    "on the left": ("on the right",),
    "on the right": ("on the left",),
    "next to": ("on top of", "far from"),
    "above": ("below",),
    "below": ("above",),
    "over": ("under",),
    "under": ("on", "over"),
    "underneath": ("on top of",),
    "beneath": ("on top of",),
    "behind": ("in front of",),
    "beside": ("on top of", "behind"),
    "inside": ("outside",),
    "outside": ("inside",),
    "between": ("behind",),
    "near": ("on top of", "far from"),
    "on": ("under", "next to"),
}


class Segment(NamedTuple):
    """A stretch of a text, text[start:end], that says one thing; `word` is how a list here or a vocabulary has it."""

    kind: Kind
    word: str
    start: int
    end: int


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_COLOUR = re.compile(rf"\b(?:{_any(COLOURS)})\b", re.IGNORECASE)
# A figure that is part of a time, a date, a price or a measure is no count.
_NUMBER = re.compile(rf"\b(?:{_any(NUMBERS)})\b|(?<![\w.:/$-])(?:[2-9]|1\d|20)(?![\w:/%-]|\.\d)", re.IGNORECASE)
# Before an article or the like, "on" is a place: neither a light that is on nor what something is based on.
_ON = r"on(?=\s+(?:an?|the|his|her|its|their|top)\b)"
_RELATION = re.compile(
    rf"\b(?:{_any([word for word in RELATIONS if word != 'on'])}|(?<!based )(?<!depending )(?<!focus ){_ON})\b",
    re.IGNORECASE,
)
_VERDICT = re.compile(r"(?:yes|no)\b", re.IGNORECASE)


def segments(text: str, vocabulary: Vocabulary) -> list[Segment]:
    """What a text says of a picture, in order; segments do not overlap.

    An object's name wins over words in it ("red circle" may be one object), but a colour before an object is a colour
    ("an orange cat" names no fruit). Yes or no at the very beginning is a verdict.
    """
    taken: list[Segment] = []
    for segment in _found(text, vocabulary):
        if all(segment.end <= other.start or other.end <= segment.start for other in taken):
            taken.append(segment)
    return sorted(taken, key=lambda segment: segment.start)


def _found(text: str, vocabulary: Vocabulary) -> Iterator[Segment]:
    """Candidates, the ones that win over later ones first."""
    verdict = _VERDICT.match(text)
    if verdict:
        yield Segment("verdict", verdict[0].lower(), 0, verdict.end())
    mentions = vocabulary.mentions(text)
    starts = {mention.start for mention in mentions}
    for mention in mentions:
        after = text[mention.end :]
        is_colour = _COLOUR.fullmatch(text[mention.start : mention.end]) and (
            mention.end + len(after) - len(after.lstrip()) in starts
        )
        if not is_colour:
            yield Segment("object", mention.object, mention.start, mention.end)
    rest: tuple[tuple[Kind, re.Pattern[str]], ...] = (
        ("relation", _RELATION),
        ("colour", _COLOUR),
        ("number", _NUMBER),
    )
    for kind, pattern in rest:
        for match in pattern.finditer(text):
            yield Segment(kind, " ".join(match[0].lower().split()), match.start(), match.end())


def masked(text: str, segments: Sequence[Segment]) -> str:
    """The text with `MASK` in the place of segments; of those that only white space parts, one for all."""
    if not segments:
        return text
    pieces, position = list[str](), 0
    for before, segment in pairwise([None, *segments]):
        assert segment is not None
        if before is None or text[before.end : segment.start].strip():
            pieces += [text[position : segment.start], MASK]
        position = segment.end
    return "".join([*pieces, text[position:]])


def masker(vocabulary: Vocabulary) -> Callable[[str], str]:
    """Masks objects, colours, numbers and relations of an answer, as Re-Align's language model is asked to."""

    def mask(text: str) -> str:
        return masked(text, [one for one in segments(text, vocabulary) if one.kind != "verdict"])

    return mask
