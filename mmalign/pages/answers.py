"""Gallery layout for answers about images before and after alignment, with invented objects marked."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from mmalign.evaluation.benchmarks.base import RatedAnswer
from mmalign.pages.grid import INK, MUTED, SMALL, TEXT, Cell, Piece, Text, Tile
from mmalign.pages.page import GalleryEntry, PageLayout
from mmalign.pages.ranking import format_change, format_scores, kind


class Span(NamedTuple):
    """A part of an answer; `invented` is True if it names an object that is not in the image."""

    text: str
    invented: bool


def spans(answer: RatedAnswer) -> list[Span]:
    """Split an answer's text where invented spans begin and end."""
    parts, end = list[Span](), 0
    for start, stop in answer.invented:
        parts += [Span(answer.text[end:start], False), Span(answer.text[start:stop], True)]
        end = stop
    return [part for part in (*parts, Span(answer.text[end:], False)) if part.text]


def answer_entry(
    image: Image.Image, name: str, question: str, truth: str, before: RatedAnswer, after: RatedAnswer
) -> GalleryEntry:
    """Return the gallery entry of a question about an image; `truth` is the correct answer in words."""
    reduced = image.copy()
    reduced.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)  # the page shows it no larger
    answers = {"before": before, "after": after}
    details = {
        "name": name,
        "question": question,
        "truth": truth,
        **{side: {"text": answer.text, "pieces": spans(answer)} for side, answer in answers.items()},
    }
    scores = (before.score, after.score)
    # A tile with the image above the truth, and the question with both answers to the right
    texts = [Text([Piece(f"{question}  ", MUTED), Piece(format_change(scores), INK[kind(scores)])])]
    for (side, answer), score in zip(answers.items(), format_scores(scores), strict=True):
        parts = spans(answer) or [Span("(nothing)", False)]
        pieces = [Piece(part.text, INK["lost"] if part.invented else TEXT, part.invented) for part in parts]
        rating = Text([Piece(f"{side} {score}  ·  {answer.note}", MUTED)], 16)
        texts += [rating, Text(pieces, num_lines=6)]
    below = Text([Piece(f"truth: {truth}", MUTED)], 16, num_lines=2)
    tile = Tile([Cell([below], reduced), Cell(texts, width=430)])
    return GalleryEntry(question, name, scores, (before.note, after.note), {"image": reduced}, details, tile)


LAYOUT = PageLayout(
    template="answers.html.jinja",
    lead="The same images and questions, answered before and after. Underlined: named, but not in the image.",
    noun="question",
    columns=2,
    num_in_grid=12,
)
