"""Gallery of answers about an image before and after alignment, with the objects that they invent marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from mmalign.pages.grid import INK, MUTED, SMALL, TEXT, Cell, Piece, Text, Tile
from mmalign.pages.page import GalleryEntry, PageLayout
from mmalign.pages.ranking import change, format_score, kind


@dataclass(frozen=True)
class RatedAnswer:
    """A model's answer and its rating.

    Attributes:
        text: the answer.
        score: higher is better.
        note: the score in words, such as "2 of 3 named, 1 invented".
        invented: spans of the text that name objects which are not in the image, [start, end), in order and apart.
    """

    text: str
    score: float
    note: str
    invented: tuple[tuple[int, int], ...] = ()


class Span(NamedTuple):
    """A part of an answer, and whether it names an object that is not in the image."""

    text: str
    invented: bool


def spans(answer: RatedAnswer) -> list[Span]:
    """Return an answer's text, cut where inventions begin and end."""
    parts, end = list[Span](), 0
    for start, stop in answer.invented:
        parts += [Span(answer.text[end:start], False), Span(answer.text[start:stop], True)]
        end = stop
    return [part for part in (*parts, Span(answer.text[end:], False)) if part.text]


def answer_entry(
    image: Image.Image, name: str, question: str, truth: str, before: RatedAnswer, after: RatedAnswer
) -> GalleryEntry:
    """Return the entry of one question about an image, with the ground-truth answer in words."""
    reduced = image.copy()
    reduced.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)  # as large as the page shows it
    details = {
        "name": name,
        "question": question,
        "truth": truth,
        "before": {"text": before.text, "pieces": spans(before)},
        "after": {"text": after.text, "pieces": spans(after)},
    }
    scores, notes = (before.score, after.score), (before.note, after.note)
    return GalleryEntry(question, name, scores, notes, {"image": reduced}, details)


def _tile(entry: GalleryEntry) -> Tile:
    """Return a picture over the truth, and beside it the question with both answers, inventions underlined in red."""
    texts = [
        Text(
            [Piece(f"{entry.title}  ", MUTED), Piece(format_score(change(entry.scores), "+"), INK[kind(entry.scores)])]
        )
    ]
    for side, score, note in zip(("before", "after"), entry.scores, entry.notes, strict=True):
        parts = entry.details[side]["pieces"] or [Span("(nothing)", False)]
        pieces = [Piece(part.text, INK["lost"] if part.invented else TEXT, part.invented) for part in parts]
        rating = Text([Piece(f"{side} {format_score(score)}  ·  {note}", MUTED)], 16)
        texts += [rating, Text(pieces, num_lines=6)]
    truth = Text([Piece(f"truth: {entry.details['truth']}", MUTED)], 16, num_lines=2)
    return Tile([Cell([truth], entry.images["image"]), Cell(texts, width=430)])


LAYOUT = PageLayout(
    template="answers.html.jinja",
    lead="The same images and questions, answered before and after. Underlined: named, but not in the image.",
    noun="question",
    tile=_tile,
    columns=2,
    num_in_grid=12,
)
