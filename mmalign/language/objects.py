"""Object words in a text: the named objects, with their positions and repetitions.

A `Vocabulary` holds objects and the words for them. `mentions` reads a text from left to right and takes the longest
known phrase: "two hot dogs" is one mention of "hot dog" and none of "dog". Words are compared in lower case, unchanged
or in the singular, so "knives" matches "knife". Phrases do not reach across punctuation, and a hyphenated word is one
word ("dog-friendly" names no dog). Negation is ignored: "there is no dog" mentions a dog, as it does in every
published measure of this kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

Variant = Literal["published", "refined"]

_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Mention(NamedTuple):
    """An object named in a text, at text[start:end], by `word` as the vocabulary lists it."""

    object: str
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """Objects and the words for them, created by `vocabulary` or `coco_vocabulary`.

    Attributes:
        objects: the names of the objects, in order.
        meanings: a map from a word to its object.
        readings: a map from a phrase, as a tuple of words, to the word it stands for, which need not name an object.
        unless: a map from a word to another that cancels it if the text has both.
    """

    objects: tuple[str, ...]
    meanings: Mapping[str, str]
    readings: Mapping[tuple[str, ...], str]
    unless: Mapping[str, str]

    def mentions(self, text: str) -> list[Mention]:
        """Return every object word of a text, in order and with repetition."""
        spans = self._words(text)
        words = {word for word, _, _ in spans}
        return [
            Mention(self.meanings[word], word, start, end)
            for word, start, end in spans
            if word in self.meanings and self.unless.get(word) not in words
        ]

    def object_of(self, name: str, at: str = "objects") -> str:
        """Return the object for a name from an annotation: one of its words, in any case, singular or plural.

        Args:
            name: the name.
            at: its place, for the error.

        Raises:
            ValueError: the vocabulary has no such word.
        """
        word = self._reading(tuple(token for token, _, _ in tokens(name)))
        if word is None or word not in self.meanings:
            raise ValueError(
                f"{at}: {name!r} is not a word of the vocabulary, which has {len(self.objects)} objects "
                f"({', '.join(self.objects[:5])}, ...); expected one of their words, so add it or leave it out"
            )
        return self.meanings[word]

    def _words(self, text: str) -> list[tuple[str, int, int]]:
        """Return the words that a text's phrases stand for, each with its start and end."""
        came = tokens(text)
        longest = max(map(len, self.readings))
        words, position = [], 0
        # The longest phrase that begins here, else on to the next word
        while position < len(came):
            for length in range(min(longest, len(came) - position), 0, -1):
                word = self._reading(tuple(token for token, _, _ in came[position : position + length]))
                if word is not None:
                    words.append((word, came[position][1], came[position + length - 1][2]))
                    position += length
                    break
            else:
                position += 1
        return words

    def _reading(self, phrase: tuple[str, ...]) -> str | None:
        as_it_stands = self.readings.get(phrase)
        return self.readings.get(tuple(map(singular, phrase))) if as_it_stands is None else as_it_stands


def tokens(text: str) -> list[tuple[str, int, int]]:
    """Return the words and punctuation marks of a text, in lower case, with their positions text[start:end]."""
    return [(match.group().lower(), match.start(), match.end()) for match in _TOKEN.finditer(text)]


def vocabulary(
    synonyms: Mapping[str, Iterable[str]],
    *,
    read_as: Mapping[str, str] = _NOTHING,
    unless: Mapping[str, str] = _NOTHING,
) -> Vocabulary:
    """Create a vocabulary of any objects: `vocabulary({"circle": ["disc"], "red square": []})`.

    Args:
        synonyms: a map from each object to other words for it; the object's own name is one of its words.
        read_as: phrases that stand for another word: {"baby bear": "bear"}. A phrase that stands for itself and for no
            object ({"train track": "train track"}) hides the words in it.
        unless: a map from a word to another that cancels it if the text has both: {"seat": "toilet"}.

    Raises:
        ValueError: there is no object, a word is empty, or a word stands for two objects.
    """
    if not synonyms:
        raise ValueError("vocabulary: no objects; expected at least one, with its words")
    # A word stands for one object alone
    meanings: dict[str, str] = {}
    for name, words in synonyms.items():
        for word in map(_plain, (name, *words)):
            if meanings.setdefault(word, name) != name:
                raise ValueError(
                    f"vocabulary: {word!r} is a word for {meanings[word]!r} and for {name!r}; "
                    "expected one object for each word, so drop one of the two"
                )
    # Words stand for themselves, and phrases for the word that they are read as
    plain = {**{word: word for word in meanings}, **{_plain(phrase): _plain(word) for phrase, word in read_as.items()}}
    readings = {tuple(phrase.split()): word for phrase, word in plain.items()}
    # The singular of a phrase stands for it too ("sport ball" for "sports ball"), unless it is another phrase.
    for phrase, word in list(readings.items()):
        readings.setdefault(tuple(map(singular, phrase)), word)
    return Vocabulary(tuple(synonyms), meanings, readings, {_plain(a): _plain(b) for a, b in unless.items()})


def _plain(word: str) -> str:
    """Normalise a word for comparison: tokens in lower case, one space between them."""
    plain = " ".join(_TOKEN.findall(word.lower()))
    if not plain:
        raise ValueError(f"vocabulary: {word!r} is not a word; expected letters")
    return plain


# CHAIR's rules beside its list (utils/chair.py of https://github.com/LisaAnne/Hallucination). Baby and adult animals
# are not persons, and a passenger jet is a jet. Home plates and train tracks are neither plates nor trains.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_READ_AS = {
    **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "home plate",
    "train track": "train track",
}
_ADDED = {"brother", "pedestrian", "coffee table", "remote control"}
# CHAIR's release never finds these words. Two begin with a second space, one is in upper case although captions are
# lowered first, and one is longer than the two words of the longest phrases that the release looks up.
_UNREACHABLE = {"motor bike", "cheesecake", "iphone", "stove top oven"}


@cache
def coco_vocabulary(variant: Variant = "refined") -> Vocabulary:
    """Return the 80 objects of MSCOCO with the synonyms of CHAIR (arXiv:1809.02156).

    "published" is the list as it works in CHAIR's release, which never finds "motor bike", "cheesecake", "iPhone" and
    "stove top oven". There "stove top oven" is a stove and an oven, and "motor bike" is nothing. "refined" is the list
    of Object HalBench (RLHF-V, arXiv:2312.00849), which has four more words (brother, pedestrian, coffee table, remote
    control). All its words are found here; its release still misses "iPhone" and "stove top oven".

    Singulars here differ from both releases. CHAIR's uses `pattern.en`, which turns "bus" into "bu" and "ties" into
    "ty", and so misses them. Object HalBench's uses the WordNet lemmatizer. Here the singular of "bus" is "bus".
    """
    if variant not in ("published", "refined"):
        raise ValueError(f"coco_vocabulary: {variant!r} is not a variant; expected 'published' or 'refined'")
    listed = [line.split(", ") for line in _word_list("coco_objects.txt")]
    read_as = dict(_READ_AS)
    left_out: set[str] = set()
    # The words of CHAIR's list alone, less those that its release never finds
    if variant == "published":
        left_out = _ADDED | _UNREACHABLE
        read_as["motor bike"] = "motor bike"
    synonyms = {name: [word for word in words if word not in left_out] for name, *words in listed}
    return vocabulary(synonyms, read_as=read_as, unless={"seat": "toilet"})


@cache
def _plurals() -> tuple[dict[str, str], dict[str, str]]:
    """Return irregular plurals with their singulars: whole words, and ends of compounds."""
    pairs = [line.split() for line in _word_list("plurals.txt")]
    return (
        {plural: one for plural, one in pairs if not plural.startswith("-")},
        {plural[1:]: one for plural, one in pairs if plural.startswith("-")},
    )


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Return the singular of an English noun in lower case; other words, such as "bus" and "glass", stay unchanged.

    The rules may get a rare irregular noun wrong. Both sides of a comparison use them, so most such errors are
    harmless.
    """
    # Irregular plurals, then endings, then the rules
    words, ends = _plurals()
    if word in words:
        return words[word]
    for end, suffix in ends.items():
        if word.endswith(end):
            return word.removesuffix(end) + suffix
    if not word.endswith("s") or len(word) < 3 or word.endswith(("ss", "us", "sis")):
        return word
    # Not so "ties", whose singular ends in "ie"
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("oes", "ches", "shes", "xes", "sses", "uses")) and not word.endswith(("shoes", "ouses")):
        return word[:-2]
    return word[:-1]


def article(noun: str) -> str:
    """Return "an" before a vowel, else "a"."""
    return "an" if noun[0].lower() in "aeiou" else "a"


def _word_list(name: str) -> list[str]:
    """Return the lines of a file in words/, without comments."""
    lines = Path(__file__).with_name("words").joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
