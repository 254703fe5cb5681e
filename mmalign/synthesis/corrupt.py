"""Rule-based corruption of true answers in a few words, where POVID asks a language model (arXiv:2402.11411).

An object gives way to a frequent companion of the answer's objects, or gets one beside it. Colours, counts and
relations change, and a yes becomes a no. All other words stay, so the two answers differ in little but the truth.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from mmalign.language.objects import Vocabulary, article, singular
from mmalign.rng import KeyedRNG
from mmalign.synthesis.segments import COLOURS, NUMBERS, RELATIONS, Segment, segments

Companions = Mapping[str, Sequence[str]]  # from an object to those that occur with it, the most frequent first

NEAREST = 5  # companions considered as an object's replacement: the likeliest mistakes
_PLURALS = {"person": "people", "child": "children", "man": "men", "woman": "women", "foot": "feet", "mouse": "mice"}
_PLURALS |= {"knife": "knives", "tooth": "teeth", "goose": "geese", "sheep": "sheep", "leaf": "leaves"}
_PLURALS |= {"scissors": "scissors", "skis": "skis", "shelf": "shelves", "loaf": "loaves"}


def companions(answers: Iterable[str], vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Return for each object those named in the same answers, most frequent first and ties by name."""
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        named = sorted({mention.object for mention in vocabulary.mentions(answer)})
        for word, other in permutations(named, 2):
            together[word][other] += 1
    return {word: sorted(others, key=lambda o: (-others[o], o)) for word, others in together.items()}


@dataclass(frozen=True)
class Corruptor:
    """A change to a share of an answer's statements about an image, and to at least one.

    Attributes:
        vocabulary: the known objects.
        companions: the objects that occur with each object; one without companions gets any from the vocabulary.
        share: the probability of changing each object, colour, count, relation or verdict.
        beside: the probability that a changed object gets a companion beside it instead of being replaced.
    """

    vocabulary: Vocabulary
    companions: Companions
    share: float
    beside: float = 0.5

    def __call__(self, answer: str, row: int, rng: KeyedRNG) -> str | None:
        """Return the corrupted answer, the same for the same row and `rng`; None if no rule applies to it."""
        found_segments = segments(answer, self.vocabulary)
        if not found_segments:
            return None
        uniforms = rng.uniform([row], (len(found_segments), 3), "corrupt")[0]  # columns: whether, how, which word
        least = float(uniforms[:, 0].min())  # this segment changes in any case
        named = {segment.word for segment in found_segments if segment.kind == "object"}
        pieces, position = list[str](), 0
        # Texts between the segments stay; an article before a changed word is made to fit
        for segment, (whether, how, choice) in zip(found_segments, uniforms.tolist(), strict=True):
            if whether >= self.share and whether > least:
                continue
            before = "".join(pieces) + answer[position : segment.start]
            changed = self._change(answer, segment, named, how, choice)
            pieces, position = [_with_article(before, changed), changed], segment.end
        return "".join([*pieces, answer[position:]])

    def _change(self, answer: str, segment: Segment, named: set[str], how: float, choice: float) -> str:
        """Return a segment's replacement by two random numbers from 0 to 1, and add a new object to `named`."""
        text = answer[segment.start : segment.end]
        if segment.kind == "object":
            return self._other_object(text, segment.word, named, how, choice)
        if segment.kind == "verdict":
            new = "no" if segment.word == "yes" else "yes"
        elif segment.kind == "relation":
            new = _pick(RELATIONS[segment.word], choice)
        elif segment.kind == "number":
            new = _other_number(segment.word, choice)
        else:
            # Both spellings of gray are one colour
            alike = {segment.word, "gray", "grey"} if segment.word in ("gray", "grey") else {segment.word}
            new = _pick([colour for colour in COLOURS if colour not in alike], choice)
        return _cased(new, text)

    def _other_object(self, text: str, word: str, named: set[str], how: float, choice: float) -> str:
        """Return the text with a companion in the object's place, or beside it."""
        # Objects that are frequent beside this one, or else any that the answer does not name
        near = [one for one in self.companions.get(word, ()) if one not in named][:NEAREST]
        strangers = [one for one in self.vocabulary.objects if one not in named]
        others = near or strangers or [one for one in self.vocabulary.objects if one != word]
        if not others:
            return text
        new = _pick(others, choice)
        named.add(new)
        # Beside the object, or in its place in the same number
        if how < self.beside:
            return f"{text} and {article(new)} {new}"
        last = text.split()[-1]
        return _cased(plural(new) if singular(last.lower()) != last.lower() else new, text)


def _pick(words: Sequence[str], choice: float) -> str:
    return words[int(choice * len(words))]


def _other_number(word: str, choice: float) -> str:
    """Return a count off by one or two, spelled out if `word` is."""
    count = NUMBERS.index(word) + 2 if word in NUMBERS else int(word)
    new = int(_pick([str(n) for n in (count - 2, count - 1, count + 1, count + 2) if n >= 2], choice))
    return NUMBERS[new - 2] if word in NUMBERS and new - 2 < len(NUMBERS) else str(new)


def _cased(new: str, old: str) -> str:
    """Capitalise the new word if the old one begins with a capital."""
    return new[0].upper() + new[1:] if old[0].isupper() else new


_BEFORE = re.compile(r"\b(an?)(\s+)\Z", re.IGNORECASE)


def _with_article(before: str, after: str) -> str:
    """Return the text before a word, with its last article, "a" or "an", made to fit the word."""
    match = _BEFORE.search(before)
    if match is None:
        return before
    return before[: match.start()] + _cased(article(after), match[1]) + match[2]


def plural(noun: str) -> str:
    """Return the plural of an English noun in lower case; of several words, only the last changes."""
    *rest, last = noun.split(" ")
    if last in _PLURALS:
        many = _PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        many = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return " ".join([*rest, many])
