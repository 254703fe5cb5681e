"""True answers cut open, so that a model can go on with them untruthfully: the text side of BDHS and of Re-Align.

An answer falls into sentences whose pieces join to the answer again. Of a sentence only a beginning is kept, the
`head`, and what a model says next takes the place of the rest. Whatever a model says in one sentence, the next one
begins after the true words, so that one slip does not lead to another.

S sentences of an answer. Every choice is drawn by row, so that an answer is cut the same way in any company.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mmalign.rng import KeyedRNG

# Where a sentence that a model goes on with ends: at the first full stop (Algorithm 1 of arXiv:2407.02477), and with
# its line, since an item of a list need not have one.
STOPS = (".", "\n")
MASK = "[MASK]"

# The shortest stretch up to marks that end a sentence, or to the end of its line, with all the white space after it.
_PIECE = re.compile(r"\s*.*?(?:[.!?]+[\"'\u201d\u2019)\]]*(?=\s|\Z)|(?=\n)|\Z)\s*", re.DOTALL)
_ABBREVIATED = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|approx|e\.g|i\.e)\.\s*\Z", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
# The paper's expression has no border after the word, and so rewrites "Not" and "North" too.
_VERDICT = re.compile(r"\s*(Yes|yes|No|no)\b")
_OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


class Opening(NamedTuple):
    """A sentence of an answer, up to where a model is to go on with it.

    Attributes:
        history: the true answer before the sentence, with the white space after it.
        head: how the sentence begins; it ends with a word, or is empty.
        tail: the white space after the sentence.
    """

    history: str
    head: str
    tail: str

    @property
    def start(self) -> str:
        """All that has been said when the model goes on."""
        return self.history + self.head

    def closed(self, text: str) -> str:
        """The sentence as the model ended it, with the true one's white space after it.

        Args:
            text: what follows `start`, with the space that parts the two; after an empty head the history brings it.
        """
        return (self.head + text if self.head else text.lstrip()).rstrip() + self.tail


Part = str | Opening  # of an answer: a sentence that stays, or one that a model is to go on with
WHOLE: tuple[Part, ...] = (Opening("", "", ""),)  # an answer of which nothing is given


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it; joined they are the text again.

    A sentence ends with a full stop, a question or an exclamation mark before white space, or with its line. What has
    no letter is no sentence and belongs to the next one, so that "1. A dog." is one; a few abbreviations end none.
    """
    parts = [""]
    for piece in _PIECE.findall(text):
        if _LETTER.search(parts[-1]) and not _ABBREVIATED.search(parts[-1]):
            parts.append("")
        parts[-1] += piece
    if len(parts) > 1 and not _LETTER.search(parts[-1]):  # marks and spaces at the very end
        parts[-2:] = ["".join(parts[-2:])]
    return [one for one in parts if one]


def opposite(sentence: str) -> str | None:
    """The sentence with its first word turned from yes to no or from no to yes; None if that is neither."""
    verdict = _VERDICT.match(sentence)
    if verdict is None:
        return None
    return sentence[: verdict.start(1)] + _OPPOSITE[verdict[1]] + sentence[verdict.end(1) :]


def contradicts(answer: str, other: str) -> bool:
    """Whether one of two answers begins with yes and the other one with no."""
    begun = [_VERDICT.match(text) for text in (answer, other)]
    words = {match[1].lower() for match in begun if match is not None}
    return len(words) == 2


def openings(answer: str, row: int, rng: KeyedRNG, attempt: int = 0) -> list[Part]:
    """Every sentence of an answer, cut after a random number of its words.

    Before that, yes and no at the beginning of a sentence are exchanged half of the time; the exchanged word is then
    kept, since otherwise nothing would be left of it. A sentence keeps at most all words but its last one (the paper
    says "up to a random position"; ours are the borders between words).

    Args:
        answer: the true one.
        row: its key.
        rng: the seed and the epoch.
        tried: which attempt this is; each is cut anew.
    """
    whole, pieces, history = sentences(answer), list[Part](), ""
    uniforms = rng.uniform([row], (max(len(whole), 1), 2), "openings", attempt)[0].tolist()
    for sentence, (swap, place) in zip(whole, uniforms, strict=False):
        other = opposite(sentence) if swap >= 0.5 else None
        pieces.append(_cut(history, other or sentence, place, at_least=1 if other else 0))
        history += sentence
    return pieces


def _cut(history: str, sentence: str, place: float, at_least: int) -> Opening:
    """The sentence up to the end of one of its words: `place`, from 0 to 1, says which of the possible ones."""
    words = list(_WORD.finditer(sentence))
    kept = at_least + int(place * max(len(words) - at_least, 1))
    head = sentence[: words[kept - 1].end()] if kept else ""
    return Opening(history, head, _trailing(sentence))


def masked_openings(answer: str, masked: str) -> list[Part]:
    """Every sentence of an answer, cut before its first `MASK`; a sentence that has none stays whole.

    Args:
        answer: the true one.
        masked: the same with `MASK` in the place of some of its words.

    Raises:
        ValueError: the two have different numbers of sentences, so that more than words was replaced.
    """
    whole, covered, pieces, history = sentences(answer), sentences(masked), list[Part](), ""
    if len(whole) != len(covered):
        raise ValueError(f"the masked answer has {len(covered)} sentences, and the answer has {len(whole)}")
    for sentence, other in zip(whole, covered, strict=True):
        head = other.partition(MASK)[0].rstrip()
        pieces.append(Opening(history, head, _trailing(sentence)) if MASK in other else sentence)
        history += sentence
    return pieces


def joined(parts: Sequence[Part], texts: Sequence[str]) -> str:
    """An answer of its parts, with what a model said after the `start` of every opening, in order."""
    rest = iter(texts)
    return "".join(part if isinstance(part, str) else part.closed(next(rest)) for part in parts).strip()


def _trailing(sentence: str) -> str:
    return sentence[len(sentence.rstrip()) :]
