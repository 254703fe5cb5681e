"""Answers about an image before and after alignment, with what they invent marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from mmalign.page.files import Layout
from mmalign.page.grid import INK, LINE, MUTED, SMALL, TEXT, badge, fit, load_font, plain, wrap, write_line
from mmalign.page.ranking import shown

_TEXT_WIDTH, _MOST_LINES = 430, 6  # of a grid's tile: the room of its texts in pixels, and the lines of an answer
_NOTHING = "(nothing)"  # in the place of an empty answer
_INVENTED = INK["lost"][0]


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: its answer.
        score: better when higher.
        note: what the score means, such as "2 of 3 named, 1 invented".
        invented: where the text names what is not in the image, [start, end), in order and apart.
    """

    text: str
    score: float
    note: str
    invented: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Entry:
    """A question about an image, and the answers before and after alignment.

    Attributes:
        image: what was asked about.
        name: the image's.
        question: what was asked.
        truth: what would have been right, in words.
        before: of the base model.
        after: of the aligned one.
    """

    image: Image.Image
    name: str
    question: str
    truth: str
    before: Answer
    after: Answer

    @property
    def title(self) -> str:
        """The question."""
        return self.question

    @property
    def scores(self) -> tuple[float, float]:
        """Before, after."""
        return self.before.score, self.after.score

    @property
    def notes(self) -> tuple[str, str]:
        """Before, after."""
        return self.before.note, self.after.note


class Piece(NamedTuple):
    """A part of an answer, and whether it names what is not in the image."""

    text: str
    invented: bool


Word = list[Piece]


def pieces(answer: Answer) -> list[Piece]:
    """An answer's text, cut where inventions begin and end."""
    found, at = list[Piece](), 0
    for start, end in answer.invented:
        found += [Piece(answer.text[at:start], False), Piece(answer.text[start:end], True)]
        at = end
    return [piece for piece in (*found, Piece(answer.text[at:], False)) if piece.text]


# ------------------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class AnswerTile:
    """A picture, and beside it the question over both answers; inventions are underlined in red."""

    unit: int
    height: int
    columns: int = 2

    @property
    def side(self) -> int:
        """Of the picture."""
        return SMALL * self.unit

    @property
    def width(self) -> int:
        """See grid.Tile."""
        return self.side + (20 + _TEXT_WIDTH) * self.unit

    def draw(self, canvas: Image.Image, brush: ImageDraw.ImageDraw, entry: Entry, place: tuple[int, int]) -> None:
        """See grid.Tile."""
        (x, y), unit = place, self.unit
        canvas.paste(fit(entry.image, self.side), place)
        brush.rectangle((x, y, x + self.side - 1, y + self.side - 1), outline=LINE)
        for k, line in enumerate(_truth_lines(entry, unit)):
            write_line(brush, (x, y + self.side + (6 + 20 * k) * unit), line, 16 * unit, MUTED, self.side)
        left, room = x + self.side + 20 * unit, _TEXT_WIDTH * unit
        write_line(brush, (left, y), entry.question, 18 * unit, MUTED, room - 90 * unit)
        badge(brush, (left + room, y - 2 * unit), entry, unit)
        y += 34 * unit
        for name, answer in (("before", entry.before), ("after", entry.after)):
            write_line(brush, (left, y), f"{name} {shown(answer.score)}  ·  {answer.note}", 16 * unit, MUTED, room)
            y += 23 * unit
            for words in _lines(answer, unit):
                _write_words(brush, (left, y), words, unit)
                y += 24 * unit
            y += 10 * unit


def _tiles(entries: Sequence[Entry], unit: int) -> AnswerTile:
    texts = max(sum(57 + 24 * (len(_lines(a, unit)) - 1) for a in (e.before, e.after)) for e in entries)
    num_lines = max(len(_truth_lines(entry, unit)) for entry in entries)
    return AnswerTile(unit, max(SMALL + 8 + 20 * num_lines, 34 + texts) * unit)


def _truth_lines(entry: Entry, unit: int) -> list[str]:
    return wrap(entry.truth, load_font(16 * unit), SMALL * unit)


def _lines(answer: Answer, unit: int) -> list[list[Word]]:
    """An answer in lines of words; what is beyond the last line is left out, and dots say so."""
    font, room = load_font(18 * unit), _TEXT_WIDTH * unit
    lines: list[list[Word]] = [[]]
    for word in _words(answer):
        if lines[-1] and font.getlength(" ".join(map(_text, [*lines[-1], word]))) > room:
            lines.append([])
        lines[-1].append(word)
    if len(lines) > _MOST_LINES:
        lines = lines[:_MOST_LINES]
        lines[-1][-1] = [Piece("...", False)]
    return lines


def _words(answer: Answer) -> list[Word]:
    """The words between white space, each in its pieces: of "cross." the stop may be no part of what is invented."""
    words: list[Word] = [[]]
    for text, invented in pieces(answer):
        first, *others = re.split(r"\s+", plain(text))
        words[-1] += [Piece(first, invented)] if first else []
        words += [[Piece(other, invented)] if other else [] for other in others]
    return [word for word in words if word] or [[Piece(_NOTHING, False)]]


def _text(word: Word) -> str:
    return "".join(piece.text for piece in word)


def _write_words(brush: ImageDraw.ImageDraw, place: tuple[int, int], words: Sequence[Word], unit: int) -> None:
    font, (x, y) = load_font(18 * unit), place
    under, space = y + 22 * unit, int(font.getlength(" "))
    for word, following in zip(words, [*words[1:], [Piece("", False)]], strict=True):
        for text, invented in word:
            brush.text((x, y), text, fill=_INVENTED if invented else TEXT, font=font)
            end = x + int(font.getlength(text))
            if invented:
                brush.line((x, under, end, under), _INVENTED, 2 * unit)
            x = end
        if word[-1].invented and following[0].invented:  # one line under "red circle"
            brush.line((x, under, x + space, under), _INVENTED, 2 * unit)
        x += space


# ------------------------------------------------------------------------------------------------------------- the page


def _images(entry: Entry) -> dict[str, Image.Image]:
    """The picture, no larger than the page shows it: the original lies where it was."""
    reduced = entry.image.copy()
    reduced.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)
    return {"image": reduced}


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "question": entry.question,
        "truth": entry.truth,
        "before": _told(entry.before),
        "after": _told(entry.after),
    }


def _told(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "pieces": pieces(answer)}


def _labelled(entry: Entry) -> str:
    return entry.name


LAYOUT = Layout(
    template="answers.html.jinja",
    lead="The same images and questions, answered before and after. Underlined: named, but not in the image.",
    noun="question",
    images=_images,
    describe=_described,
    label=_labelled,
    tiles=_tiles,
    grid=12,
)
