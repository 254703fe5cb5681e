"""Rule-based detection of an answer's statements about an image: objects, colours, numbers and relations.

Re-Align hides these segments from a model, and the rules for POVID change them. Objects come from a vocabulary. The
other word lists are short and unambiguous: a missed word does less harm than a misread one.
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
# Each relation with its replacements: its opposite if it has one.
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
    """A span text[start:end] that states one fact; `word` is its form in the vocabulary or in a list of this module."""

    kind: Kind
    word: str
    start: int
    end: int


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_COLOUR = re.compile(rf"\b(?:{_any(COLOURS)})\b", re.IGNORECASE)
# A digit in a time, a date, a price or a measure is not a count.
_NUMBER = re.compile(rf"\b(?:{_any(NUMBERS)})\b|(?<![\w.:/$-])(?:[2-9]|1\d|20)(?![\w:/%-]|\.\d)", re.IGNORECASE)
# Before an article or the like, "on" is a place. This excludes "the light is on" and "based on".
_ON = r"on(?=\s+(?:an?|the|his|her|its|their|top)\b)"
_RELATION = re.compile(
    rf"\b(?:{_any([word for word in RELATIONS if word != 'on'])}|(?<!based )(?<!depending )(?<!focus ){_ON})\b",
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"^[ \t]*(?:[-*+•]\s*)?[(\uff08]?\d+(?:[.)\uff09:](?=\s|\Z)|[、\uff0e])", re.MULTILINE
)  # of a numbered list
_VERDICT = re.compile(r"(?:yes|no)\b", re.IGNORECASE)


def segments(text: str, vocabulary: Vocabulary) -> list[Segment]:
    """Return a text's statements about an image, in order and without overlap.

    An object's name wins over words in it: "red circle" may be one object. A colour before an object is a colour: "an
    orange cat" names no fruit. Yes or no at the very beginning is a verdict.
    """
    taken: list[Segment] = []
    for segment in _found(text, vocabulary):
        if all(segment.end <= other.start or other.end <= segment.start for other in taken):
            taken.append(segment)
    return sorted(taken, key=lambda segment: segment.start)


def _found(text: str, vocabulary: Vocabulary) -> Iterator[Segment]:
    """Yield candidate segments in order of precedence."""
    verdict = _VERDICT.match(text)
    if verdict:
        yield Segment("verdict", verdict[0].lower(), 0, verdict.end())
    # Objects, except colours in front of an object ("orange cat")
    mentions = vocabulary.mentions(text)
    starts = {mention.start for mention in mentions}
    for mention in mentions:
        after = text[mention.end :]
        is_colour = _COLOUR.fullmatch(text[mention.start : mention.end]) and (
            mention.end + len(after) - len(after.lstrip()) in starts
        )
        if not is_colour:
            yield Segment("object", mention.object, mention.start, mention.end)
    # Relations, colours and numbers
    rest: tuple[tuple[Kind, re.Pattern[str]], ...] = (("relation", _RELATION), ("colour", _COLOUR), ("number", _NUMBER))
    # Numbers of a numbered list state nothing about an image
    markers = [match.span() for match in _MARKER.finditer(text)]
    for kind, pattern in rest:
        for match in pattern.finditer(text):
            if kind == "number" and any(start <= match.start() < end for start, end in markers):
                continue
            yield Segment(kind, " ".join(match[0].lower().split()), match.start(), match.end())


def masked(text: str, segments: Sequence[Segment]) -> str:
    """Replace each segment by `MASK`; segments with only white space between them share one."""
    if not segments:
        return text
    pieces, position = list[str](), 0
    for before, segment in pairwise([None, *segments]):
        assert segment is not None
        # Only white space since the last segment: it shares that mask
        if before is None or text[before.end : segment.start].strip():
            pieces += [text[position : segment.start], MASK]
        position = segment.end
    return "".join([*pieces, text[position:]])


def masker(vocabulary: Vocabulary) -> Callable[[str], str]:
    """Return a function that masks objects, colours, numbers and relations, as Re-Align asks of its language model."""

    def mask(text: str) -> str:
        return masked(text, [one for one in segments(text, vocabulary) if one.kind != "verdict"])

    return mask
