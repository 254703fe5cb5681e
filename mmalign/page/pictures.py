"""Pictures before and after alignment, of the same prompt and noise, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from mmalign.page.files import Layout
from mmalign.page.grid import LINE, MUTED, SMALL, TEXT, badge, fit, load_font, wrap, write_line
from mmalign.page.ranking import shown


@dataclass(frozen=True)
class Entry:
    """One prompt and seed, drawn before and after alignment from the same noise; a score is better when higher.

    A note says in words what the score means, such as "correct" or "colour, count wrong".
    """

    prompt: str
    seed: int
    before: Image.Image
    after: Image.Image
    before_score: float
    after_score: float
    before_note: str = ""
    after_note: str = ""

    @property
    def title(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def scores(self) -> tuple[float, float]:
        """Before, after."""
        return self.before_score, self.after_score

    @property
    def notes(self) -> tuple[str, str]:
        """Before, after."""
        return self.before_note, self.after_note


@dataclass(frozen=True)
class PictureTile:
    """A prompt over its two pictures, with scores, notes and the change below them."""

    unit: int
    num_lines: int
    has_notes: bool
    columns: int = 4

    @property
    def side(self) -> int:
        """Of a picture."""
        return SMALL * self.unit

    @property
    def width(self) -> int:
        """See grid.Tile."""
        return _width(self.unit)

    @property
    def height(self) -> int:
        """See grid.Tile."""
        return self.side + (6 + 27 * self.num_lines + 34 + 24 * self.has_notes) * self.unit

    def draw(self, canvas: Image.Image, brush: ImageDraw.ImageDraw, entry: Entry, place: tuple[int, int]) -> None:
        """See grid.Tile."""
        x, y = place
        unit = self.unit
        lines = wrap(entry.prompt, load_font(21 * unit), self.width)
        for k, line in enumerate(lines):  # the last line always sits on the pictures
            at = (x, y + (self.num_lines - len(lines) + k) * 27 * unit)
            write_line(brush, at, line, 21 * unit, TEXT, self.width)
        y += (6 + 27 * self.num_lines) * unit
        sides = (
            (entry.before, "before", entry.before_score, entry.before_note, x),
            (entry.after, "after", entry.after_score, entry.after_note, x + self.side + 8 * unit),
        )
        for image, name, score, note, left in sides:
            canvas.paste(fit(image, self.side), (left, y))
            brush.rectangle((left, y, left + self.side - 1, y + self.side - 1), outline=LINE)
            below = y + self.side + 8 * unit
            write_line(brush, (left, below), f"{name} {shown(score)}", 18 * unit, TEXT, self.side)
            write_line(brush, (left, below + 25 * unit), note, 16 * unit, MUTED, self.side)
        badge(brush, (x + self.width, y + self.side + 5 * unit), entry, unit)


def _width(unit: int) -> int:
    return (2 * SMALL + 8) * unit


def _tiles(entries: Sequence[Entry], unit: int) -> PictureTile:
    num_lines = max(len(wrap(e.prompt, load_font(21 * unit), _width(unit))) for e in entries)
    return PictureTile(unit, num_lines, any(e.before_note or e.after_note for e in entries))


def _images(entry: Entry) -> dict[str, Image.Image]:
    return {"before_image": entry.before, "after_image": entry.after}


def _described(entry: Entry) -> dict[str, Any]:
    return {"prompt": entry.prompt, "seed": entry.seed}


def _labelled(entry: Entry) -> str:
    return f"seed {entry.seed}"


LAYOUT = Layout(
    template="pictures.html.jinja",
    lead="The same prompts, seeds and starting noise, before and after.",
    noun="prompt",
    images=_images,
    describe=_described,
    label=_labelled,
    tiles=_tiles,
    grid=24,
)
