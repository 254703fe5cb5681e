"""The grid of a page's best gains and worst regressions as one picture, for a README. Sizes are pixels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from PIL import Image, ImageDraw, ImageFont

from mmalign.page.ranking import SECTIONS, Entry, Kind, change, choose, kind, shown

SMALL = 192  # pictures up to this side are enlarged by whole factors, pixels kept; larger ones reduced to twice this
PAGE, SURFACE, TEXT, MUTED, LINE = "#f8f7f5", "#ffffff", "#1f1c19", "#68625b", "#e6e3de"
INK = {"gained": ("#0b6b5f", "#dff2ee"), "lost": ("#a93a22", "#fbe8e3"), "unchanged": ("#68625b", "#efedea")}
_ASCII = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})  # noqa: RUF001

E = TypeVar("E", bound=Entry)
E_contra = TypeVar("E_contra", bound=Entry, contravariant=True)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Tile(Protocol[E_contra]):
    """How one entry is drawn; all tiles of a grid are of one size."""

    @property
    def columns(self) -> int:
        """The most tiles in a row."""

    @property
    def width(self) -> int:
        """Of a tile."""

    @property
    def height(self) -> int:
        """Of a tile."""

    def draw(self, canvas: Image.Image, brush: ImageDraw.ImageDraw, entry: E_contra, place: tuple[int, int]) -> None:
        """Draw an entry; `place` is the tile's top left corner."""


class Tiles(Protocol[E_contra]):
    """Makes the tile that has room for each of these entries; `unit` is 1, or 2 where the pictures are large."""

    def __call__(self, entries: Sequence[E_contra], unit: int) -> Tile[E_contra]: ...  # noqa: D102


def draw_grid(
    entries: Sequence[E],
    title: str,
    lines: Sequence[str],
    counts: Mapping[Kind, int],
    tiles: Tiles[E],
    *,
    number: int,
    unit: int,
) -> Image.Image:
    """Title and lines, then a section of tiles for each kind: at most `number` entries in all, of these counts."""
    chosen = choose(entries, number)
    tile = tiles([entries[i] for indices in chosen.values() for i in indices], unit)
    columns = min(tile.columns, max(2, *map(len, chosen.values())))
    margin, heading, gutter = 48 * unit, 84 * unit, 28 * unit
    width = 2 * margin + columns * tile.width + (columns - 1) * gutter
    top = margin + (52 + 32 * len(lines)) * unit
    num_rows = {which: math.ceil(len(indices) / columns) for which, indices in chosen.items()}
    height = top + sum(heading + n * (tile.height + gutter) for n in num_rows.values()) + margin - gutter
    canvas = Image.new("RGB", (width, height), PAGE)
    brush = ImageDraw.Draw(canvas)
    room = width - 2 * margin
    write_line(brush, (margin, margin), title, 38 * unit, TEXT, room)
    for k, line in enumerate(lines):
        write_line(brush, (margin, margin + (56 + 32 * k) * unit), line, 22 * unit, MUTED, room)
    for which, indices in chosen.items():
        label = next(heading for k, heading, *_ in SECTIONS if k == which)
        text = f"{label}  ·  {len(indices)} of {counts[which]:,}" if counts[which] else f"{label}  ·  none"
        write_line(brush, (margin, top + 36 * unit), text, 26 * unit, INK[which][0], room)
        for k, index in enumerate(indices):
            across, down = k % columns, k // columns
            place = (margin + across * (tile.width + gutter), top + heading + down * (tile.height + gutter))
            tile.draw(canvas, brush, entries[index], place)
        top += heading + num_rows[which] * (tile.height + gutter)
    return canvas


def header(counts: Mapping[Kind, int], lead: str, score_name: str, summary: Sequence[Sequence[str]]) -> list[str]:
    """What is shown, what the score is, how many gained and lost, and the summary's first line."""
    lines = [lead, f"Score: {score_name}.", ", ".join(f"{number:,} {which}" for which, number in counts.items()) + "."]
    if len(summary) > 1:
        lines.append("  ·  ".join(f"{name}: {cell}" if name else cell for name, cell in zip(*summary[:2], strict=True)))
    return lines


def badge(brush: ImageDraw.ImageDraw, corner: tuple[int, int], entry: Entry, unit: int) -> None:
    """The change in a pill whose top right is `corner`; a triangle says the direction without colour."""
    ink, soft = INK[kind(entry)]
    text, font = shown(change(entry), "+"), load_font(17 * unit)
    right, top = corner
    left = right - int(font.getlength(text)) - 36 * unit
    brush.rounded_rectangle((left, top, right - 1, top + 26 * unit), 13 * unit, fill=soft)
    x, y = left + 15 * unit, top + 13 * unit
    tip = {"gained": -5, "lost": 5, "unchanged": 0}[kind(entry)] * unit
    brush.polygon([(x - 5 * unit, y - tip), (x + 5 * unit, y - tip), (x, y + tip)], fill=ink)
    brush.text((left + 26 * unit, y), text, fill=ink, font=font, anchor="lm")


def fit(image: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a square: whole pixels if it must grow, smoothed if it must shrink."""
    square = Image.new("RGB", (side, side), SURFACE)
    factor = side / max(image.size)
    factor = math.floor(factor) if factor >= 1 else factor
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    square.paste(image.convert("RGB").resize(size, method), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def load_font(size: int) -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def write_line(brush: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: str, room: int) -> None:
    """A line of text, shortened to the room."""
    font = load_font(size)
    brush.text(place, _shorten(plain(text), font, room), fill=ink, font=font)


def plain(text: str) -> str:
    """Pillow's font has ASCII and little else; accents go, other characters become "?" (the page shows them)."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c == "·" else "?" for c in bare.translate(_ASCII))


def _shorten(text: str, font: Font, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap(text: str, font: Font, room: int) -> list[str]:
    """One or two lines; the second may be too long, and is shortened where it is drawn."""
    words = plain(text[:1000]).split()
    number = len(words)
    while number > 1 and font.getlength(" ".join(words[:number])) > room:
        number -= 1
    return [" ".join(part) for part in (words[:number], words[number:]) if part]
