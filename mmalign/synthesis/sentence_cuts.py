"""Sentence cuts of true answers, which a model continues untruthfully in BDHS and Re-Align.

An answer splits into sentences that join to the answer again. A cut leaves the beginning of a sentence, the `head`,
and the model's text replaces the rest. The next sentence begins after the true words, so one error does not lead to
another.

S is the number of sentences of an answer. Random draws are keyed by row, so a cut does not depend on the batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mmalign.families.types import GeneratedText
from mmalign.rng import KeyedRNG

# A continued sentence ends at the first full stop (Algorithm 1 of arXiv:2407.02477), or with its line: an item of a
# list need not have a full stop.
STOPS = (".", "\n", "。", "\uff01", "\uff1f", "؟", "।")
MASK = "[MASK]"

# The shortest stretch up to marks that end a sentence, or to the end of its line, with all the white space after it.
_CLOSING = r"[\"'\u201d\u2019)\]」』\uff09】]*"
# Full stops of Chinese, Japanese, Arabic and Hindi need no white space after them.
_END = rf"(?:[.!?]+{_CLOSING}(?=\s|\Z)|[。\uff01\uff1f｡؟।]+{_CLOSING})"
_PIECE = re.compile(rf"\s*.*?(?:{_END}|(?=\n)|\Z)\s*", re.DOTALL)
_ENDED = re.compile(rf"{_END}\s*\Z")
_ABBREVIATED = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|approx|e\.g|i\.e)\.\s*\Z", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[-'\u2019][^\W{_CJK}]+)*")
# The paper's expression has no word border at its end, so it also rewrites "Not" and "North".
_VERDICT = re.compile(r"\s*(Yes|yes|No|no)\b")
_OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


class Opening(NamedTuple):
    """A sentence of an answer, up to the point from which a model continues it.

    Attributes:
        history: the true answer before the sentence, with the white space after it.
        head: the beginning of the sentence; it ends with a word, or is empty.
        tail: the white space after the sentence.
    """

    history: str
    head: str
    tail: str

    @property
    def start(self) -> str:
        """The text that the model continues."""
        return self.history + self.head

    def closed(self, text: str) -> str:
        """Return the sentence with the model's ending and the true sentence's trailing white space.

        Args:
            text: the text after `start`, with the space between the two; after an empty head, `history` has that space.
        """
        return (self.head + text if self.head else text.lstrip()).rstrip() + self.tail


Part = str | Opening  # part of an answer: a sentence that stays, or one for a model to continue
WHOLE: tuple[Part, ...] = (Opening("", "", ""),)  # an answer to generate from its beginning


def sentences(text: str) -> list[str]:
    """Split a text into sentences with their trailing white space; joined, they are the text again.

    A sentence ends with a full stop, a question or an exclamation mark before white space, with one of a script without
    spaces, or with its line. A piece without a letter belongs to the next sentence, so "1. A dog." is one. A few
    abbreviations end no sentence.
    """
    parts = [""]
    for piece in _PIECE.findall(text):
        if _LETTER.search(parts[-1]) and not _ABBREVIATED.search(parts[-1]):
            parts.append("")
        parts[-1] += piece
    if len(parts) > 1 and not _LETTER.search(parts[-1]):  # marks and spaces at the very end
        parts[-2:] = ["".join(parts[-2:])]
    return [one for one in parts if one]


def without_torn_end(text: str) -> str:
    """Return a text up to the end of its last whole sentence; empty if no sentence is whole."""
    whole = sentences(text)
    if whole and not _ENDED.search(whole[-1]):
        whole.pop()
    return "".join(whole)


def opposite(sentence: str) -> str | None:
    """Swap yes and no at the beginning of a sentence; return None if it begins with neither."""
    verdict = _VERDICT.match(sentence)
    if verdict is None:
        return None
    return sentence[: verdict.start(1)] + _OPPOSITE[verdict[1]] + sentence[verdict.end(1) :]


def contradicts(answer: str, other: str) -> bool:
    """Return whether one of two answers begins with yes and the other with no."""
    begun = [_VERDICT.match(text) for text in (answer, other)]
    words = {match[1].lower() for match in begun if match is not None}
    return len(words) == 2


def openings(answer: str, row: int, rng: KeyedRNG, attempt: int = 0) -> list[Part]:
    """Cut every sentence of an answer after a random number of its words.

    First, half of the time, yes and no at the beginning of a sentence are swapped. A swapped word always stays in the
    head, or the swap would be lost. At most all words but the last one stay. The paper says "up to a random position";
    the positions here are the borders between words. Draws are keyed by `row` and `attempt`.
    """
    whole, pieces, history = sentences(answer), list[Part](), ""
    uniforms = rng.uniform([row], (max(len(whole), 1), 2), "openings", attempt)[0].tolist()
    # Sentences continue from the true ones before them, whatever was written there
    for sentence, (swap, place) in zip(whole, uniforms, strict=False):
        other = opposite(sentence) if swap >= 0.5 else None
        pieces.append(_cut(history, other or sentence, place, at_least=1 if other else 0))
        history += sentence
    return pieces


def _cut(history: str, sentence: str, place: float, at_least: int) -> Opening:
    """Cut a sentence after one of its words, selected among the possible ones by `place`, from 0 to 1."""
    words = list(_WORD.finditer(sentence))
    kept = at_least + int(place * max(len(words) - at_least, 1))
    head = sentence[: words[kept - 1].end()] if kept else ""
    return Opening(history, head, _trailing(sentence))


def masked_openings(answer: str, masked: str) -> list[Part]:
    """Cut every sentence of an answer before its first `MASK` in `masked`; a sentence without one stays whole.

    Raises:
        ValueError: the two have different numbers of sentences, so more than words was replaced.
    """
    whole, covered, pieces, history = sentences(answer), sentences(masked), list[Part](), ""
    if len(whole) != len(covered):
        raise ValueError(f"the masked answer has {len(covered)} sentences, and the answer has {len(whole)}")
    for sentence, other in zip(whole, covered, strict=True):
        head = other.partition(MASK)[0].rstrip()
        pieces.append(Opening(history, head, _trailing(sentence)) if MASK in other else sentence)
        history += sentence
    return pieces


def joined(parts: Sequence[Part], texts: Sequence[GeneratedText], *, whole: bool = False) -> str:
    """Join an answer's parts, with the model's texts after the `start` of each opening, in order.

    `whole` leaves out the last sentence of a text that was cut.
    """
    rest, pieces = iter(texts), list[str]()
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        text, is_cut, _ = next(rest)
        sentence = part.closed(text)
        pieces.append(without_torn_end(sentence) if is_cut and whole else sentence)
    return "".join(pieces).strip()


def _trailing(sentence: str) -> str:
    return sentence[len(sentence.rstrip()) :]
