"""Grids of images and texts as one PNG, for a README.

A grid has sections of tiles. A tile has texts above a row of cells, and a cell has an image with texts below it. Sizes
are pixels before scaling.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

SMALL = 192  # images up to this side are enlarged by whole factors without smoothing; larger ones reduced to twice this
PAGE, SURFACE, TEXT, MUTED, LINE = "#f8f7f5", "#ffffff", "#1f1c19", "#68625b", "#e6e3de"
INK = {"gained": "#0b6b5f", "lost": "#a93a22", "unchanged": "#68625b"}
MARGIN, GUTTER, GAP, FRAME = 48, 28, 12, 2  # around the grid, between tiles, between cells, around an image
NARROWEST = 0.15  # width of the narrowest letter in units of the font's size
_ASCII = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})  # noqa: RUF001


class Piece(NamedTuple):
    """A piece of a text; a marked one is underlined."""

    text: str
    ink: str = TEXT
    is_marked: bool = False


class Text(NamedTuple):
    """A text of several pieces, wrapped into at most `num_lines` lines."""

    pieces: Sequence[Piece]
    size: int = 18
    num_lines: int = 1


@dataclass(frozen=True)
class Cell:
    """An optional image, in a square as wide as the cell, and the texts below it."""

    texts: Sequence[Text]
    image: Image.Image | None = None
    width: int = SMALL
    frame: str = LINE


@dataclass(frozen=True)
class Tile:
    """Cells side by side, below a heading that they share."""

    cells: Sequence[Cell]
    heading: Sequence[Text] = ()

    @property
    def width(self) -> int:
        """The width of all cells and the gaps between them."""
        return sum(cell.width + GAP for cell in self.cells) - GAP


class Section(NamedTuple):
    """Tiles below an optional heading."""

    tiles: Sequence[Tile]
    heading: Text | None = None


def render_grid(
    title: str, lines: Sequence[str], sections: Sequence[Section], *, columns: int, unit: int = 1
) -> Image.Image:
    """Return an image of a title, lines of text and sections of tiles, at most `columns` in a row.

    All sizes are multiplied by `unit`.
    """
    tiles = [tile for section in sections for tile in section.tiles]
    tile_width = max((tile.width for tile in tiles), default=2 * SMALL)
    columns = min(columns, max(len(section.tiles) for section in sections))
    room = max(columns * (tile_width + GUTTER) - GUTTER, 2 * SMALL)
    head = [Text([Piece(title)], 38), *(Text([Piece(line, MUTED)], 22, num_lines=2) for line in lines)]

    def draw(canvas: _Canvas) -> int:
        y = canvas.write(head, MARGIN, MARGIN, room)
        for section in sections:
            if section.heading is not None:
                y = canvas.write([section.heading], MARGIN, y + GUTTER, room) + GAP
            for start in range(0, len(section.tiles), columns):
                row, top = section.tiles[start : start + columns], y + GAP
                # All images of a row begin below its tallest heading
                pictures_top = max(canvas.measure(tile.heading, tile.width) for tile in row) + top
                for index, tile in enumerate(row):
                    y = max(y, canvas.draw_tile(tile, MARGIN + index * (tile_width + GUTTER), top, pictures_top))
                y += GUTTER - GAP
        return y + MARGIN - GUTTER

    known: _Lines = {}
    height = draw(_Canvas(1, 1, unit, known))  # drawn on a canvas of one pixel to measure the height
    canvas = _Canvas(room + 2 * MARGIN, height, unit, known)
    draw(canvas)
    return canvas.image


# Wrapped lines by pieces, size, maximum number of lines and room
_Lines = dict[tuple[tuple[Piece, ...], int, int, int], list[list[Piece]]]


class _Canvas:
    """An image to draw on, in pixels before scaling; `known` keeps the lines of texts that were wrapped before."""

    def __init__(self, width: int, height: int, unit: int, known: _Lines) -> None:
        self.unit, self._known = unit, known
        self.image = Image.new("RGB", (width * unit, height * unit), PAGE)
        self.brush = ImageDraw.Draw(self.image)

    def draw_tile(self, tile: Tile, x: int, y: int, pictures_top: int) -> int:
        """Draw a tile with its images at `pictures_top`, and return its bottom."""
        self.write(tile.heading, x, y, tile.width)
        bottom = y
        for cell in tile.cells:
            below = pictures_top
            if cell.image is not None:
                # The image in its square, and a frame around that
                left, top, side = x * self.unit, below * self.unit, cell.width * self.unit
                self.image.paste(fit(cell.image, side), (left, top))
                edge = FRAME * self.unit
                box = (left - edge, top - edge, left + side + edge - 1, top + side + edge - 1)
                self.brush.rectangle(box, outline=cell.frame, width=edge)
                below += cell.width + GAP
            bottom = max(bottom, self.write(cell.texts, x, below, cell.width))
            x += cell.width + GAP
        return bottom

    def measure(self, texts: Sequence[Text], room: int) -> int:
        """Return the height of texts, one below the other."""
        return sum(_line_height(text) * len(self._lines(text, room)) for text in texts)

    def write(self, texts: Sequence[Text], x: int, y: int, room: int) -> int:
        """Write texts, one below the other, and return the bottom of the last."""
        for text in texts:
            font = ImageFont.load_default(text.size * self.unit)
            for line in self._lines(text, room):
                left, top, underline = float(x * self.unit), y * self.unit, (y + 1.2 * text.size) * self.unit
                for word in line if self.image.height > 1 else ():  # nothing is drawn to measure the height
                    self.brush.text((left, top), word.text, fill=word.ink, font=font)
                    right = left + font.getlength(word.text)
                    if word.is_marked:
                        self.brush.line((left, underline, right, underline), word.ink, 2 * self.unit)
                    left = right
                y += _line_height(text)
        return y

    def _lines(self, text: Text, room: int) -> list[list[Piece]]:
        key = tuple(text.pieces), text.size, text.num_lines, room
        if key not in self._known:
            self._known[key] = wrapped(text, room, self.unit)
        return self._known[key]


def wrapped(text: Text, room: int, unit: int = 1) -> list[list[Piece]]:
    """Return the lines of a text as words and spaces.

    A word that is wider than a line continues on the next one, after an underscore if it has one there. A text that is
    too long ends in dots.

    Args:
        text: the text.
        room: the width of a line.
        unit: the factor of all sizes.
    """
    font, width, lines = ImageFont.load_default(text.size * unit), room * unit, list[list[Piece]]()

    def is_too_wide(pieces: Sequence[Piece]) -> bool:
        return font.getlength("".join(piece.text for piece in pieces)) > width

    # More letters than this do not fit, however narrow they are
    most = math.ceil((text.num_lines + 1) * room / (NARROWEST * text.size))
    for is_space, group in itertools.groupby(_words(text.pieces, most), lambda word: word.text == " "):
        for word in _parts(list(group), is_too_wide):
            # Spaces never begin a line, and several are one
            if not is_space and (not lines or is_too_wide([*lines[-1], *word])):
                lines.append(word)
            elif lines:
                lines[-1] += word[:1] if is_space else word
        if len(lines) > text.num_lines:  # the rest is not shown
            break
    # Dots replace the last word, or the end of a line's only word
    if len(lines) > text.num_lines:
        lines = lines[: text.num_lines]
        *before, last = lines[-1]
        dots = Piece("...", text.pieces[0].ink)
        lines[-1] = [*before, *([] if before else _start([last], lambda cut: is_too_wide([*cut, dots]))), dots]
    return lines


def _words(pieces: Sequence[Piece], most: int) -> Iterator[Piece]:
    """Yield words and single spaces of the first `most` letters.

    Adjacent pieces can form one word, such as "cross" and the full stop after it.
    """
    for piece in pieces:
        for word in re.findall(r"\S+|\s+", plain(piece.text[: max(most, 0)])):
            yield piece._replace(text=" " if word.isspace() else word)
        most -= len(piece.text)
        if most <= 0:
            break


def _parts(word: list[Piece], is_too_wide: Callable[[Sequence[Piece]], bool]) -> Iterator[list[Piece]]:
    """Yield a word, or the parts of a wide one: each fills a line, up to its last underscore if it has one."""
    while (start := _start(word, is_too_wide)) != word:
        text = "".join(piece.text for piece in start)
        num_letters = text.rfind("_") + 1 or max(len(text), 1)
        yield _first(word, num_letters)
        word = _first(word, num_letters, rest=True)
    yield word


def _start(word: list[Piece], is_too_wide: Callable[[Sequence[Piece]], bool]) -> list[Piece]:
    """Return the start of a word that fits a line, by bisection; longer starts are tried only if shorter ones fit."""
    num_letters = sum(len(piece.text) for piece in word)
    most = 16
    while most < num_letters and not is_too_wide(_first(word, most)):
        most *= 2
    if most >= num_letters and not is_too_wide(word):
        return word
    most = min(most, num_letters)
    return _first(word, bisect.bisect_left(range(most), True, key=lambda n: is_too_wide(_first(word, n + 1))))


def _first(word: list[Piece], num_letters: int, *, rest: bool = False) -> list[Piece]:
    """Return the pieces of the first letters of a word, or of the rest."""
    cut = list[Piece]()
    for piece in word:
        text = piece.text[max(num_letters, 0) :] if rest else piece.text[: max(num_letters, 0)]
        cut += [piece._replace(text=text)] if text else []
        num_letters -= len(piece.text)
    return cut


def _line_height(text: Text) -> int:
    return math.ceil(1.35 * text.size)


def fit(image: Image.Image, side: int) -> Image.Image:
    """Return the image in the middle of a square: enlarged by a whole factor without smoothing, or reduced smoothly."""
    square = Image.new("RGB", (side, side), SURFACE)
    factor = side / max(image.size)
    factor = math.floor(factor) if factor >= 1 else factor
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    square.paste(image.convert("RGB").resize(size, method), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def plain(text: str) -> str:
    """Return a text in ASCII and "·", because Pillow's font has little else.

    Accents are removed, typographic dashes and quotes replaced; other characters become "?".
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c == "·" else "?" for c in bare.translate(_ASCII))


def encode_grid(canvas: Image.Image, lines: Sequence[str]) -> bytes:
    """Encode a grid as a PNG with its title and lines as text metadata, to be checked against a manifest."""
    stream, info = io.BytesIO(), PngInfo()
    info.add_itxt("Description", "\n".join(lines))
    canvas.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()
