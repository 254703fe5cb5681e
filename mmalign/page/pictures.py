"""The gallery: pictures before and after alignment side by side, the losses as easy to find as the gains.

`write_gallery` leaves in a folder `gallery.png` (a grid for a README), `index.html` (one file that needs no network),
`manifest.json` (every entry, in the order given) and `images/`. Sizes are pixels.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw, ImageFont

_SMALL = (
    192  # pictures up to this side are enlarged by whole factors, pixels kept; larger ones are reduced to twice this
)
_COLUMNS = 4
_PAGE, _SURFACE, _TEXT, _MUTED, _LINE = "#f8f7f5", "#ffffff", "#1f1c19", "#68625b", "#e6e3de"
_INK = {"gained": ("#0b6b5f", "#dff2ee"), "lost": ("#a93a22", "#fbe8e3"), "unchanged": ("#68625b", "#efedea")}
_MARKS = {"gained": "▲", "lost": "▼", "unchanged": "="}
_ASCII = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})  # noqa: RUF001
_SECTIONS = (  # kind, heading, anchor, order
    ("gained", "Best gains", "best-gains", "largest gain first"),
    ("lost", "Worst regressions", "worst-regressions", "largest loss first"),
    ("unchanged", "Unchanged", "unchanged", "in the order drawn"),
)


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
    def change(self) -> float:
        """The score after less the score before."""
        return self.after_score - self.before_score

    @property
    def kind(self) -> str:
        """`gained`, `lost`, or `unchanged` where the scores agree to within float32 rounding."""
        if math.isclose(self.before_score, self.after_score, rel_tol=1e-6, abs_tol=1e-8):
            return "unchanged"
        return "gained" if self.change > 0 else "lost"


def write_gallery(
    folder: Path,
    entries: Sequence[Entry],
    *,
    title: str,
    summary: Sequence[Sequence[str]],
    score_name: str,
    provenance: Mapping[str, str],
    grid: int = 24,
) -> Path:
    """Write the gallery of N entries and return the path of its `index.html`.

    A file appears whole or not at all, the manifest last. Other files in the folder stay as they are.

    Args:
        folder: where to write; made if it is not there.
        entries: [N] in any order; the page and the grid sort them by change.
        title: the heading of the page and the grid.
        summary: rows of text, the header first, such as `SceneComparison.table()`; empty for no table.
        score_name: what the score is, in words.
        provenance: what made the pictures (models, recipe, sampler), shown as it is.
        grid: the largest number of entries in `gallery.png`: half best gains, half worst regressions.

    Raises:
        ValueError: no entry, sizes or scores that cannot be compared, an uneven summary, or a grid of nothing.
        OSError: a file cannot be written.
    """
    _check(entries, summary, grid)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i, entry in enumerate(entries):
        names = {side: f"images/{i:04d}-{side}.png" for side in ("before", "after")}
        _write(folder / names["before"], _encode(entry.before, "PNG"))
        _write(folder / names["after"], _encode(entry.after, "PNG"))
        records.append(_record(entry, names))
    _write(folder / "gallery.png", _encode(_draw_grid(entries, title, summary, score_name, grid), "PNG"))
    _write(folder / "index.html", _page(entries, title, summary, score_name, provenance).encode())
    manifest = {
        "title": title,
        "score": score_name,
        "provenance": dict(provenance),
        "summary": [list(row) for row in summary],
        "counts": {kind: sum(entry.kind == kind for entry in entries) for kind in _MARKS},
        "entries": records,
    }
    _write(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return folder / "index.html"


def _check(entries: Sequence[Entry], summary: Sequence[Sequence[str]], grid: int) -> None:
    if not entries:
        raise ValueError("gallery: no entries; expected at least one prompt drawn before and after")
    if grid < 1:
        raise ValueError(f"gallery: a grid of {grid} entries; expected at least 1")
    for i, entry in enumerate(entries):
        where = f"gallery: entry {i} ({entry.prompt[:60]!r}, seed {entry.seed})"
        if entry.before.size != entry.after.size:
            raise ValueError(
                f"{where}: {entry.before.size} before but {entry.after.size} after; expected pictures of one size"
            )
        if not (math.isfinite(entry.before_score) and math.isfinite(entry.after_score)):
            raise ValueError(
                f"{where}: scores {entry.before_score} and {entry.after_score}; expected finite numbers, "
                "so leave out what could not be judged"
            )
    if len({len(row) for row in summary}) > 1:
        raise ValueError(f"gallery: summary rows of {[len(row) for row in summary]} cells; expected as many in each")


def _record(entry: Entry, names: Mapping[str, str]) -> dict[str, object]:
    return {
        "prompt": entry.prompt,
        "seed": entry.seed,
        "before_score": float(entry.before_score),
        "after_score": float(entry.after_score),
        "change": float(entry.change),
        "kind": entry.kind,
        "before_note": entry.before_note,
        "after_note": entry.after_note,
        "before_image": names["before"],
        "after_image": names["after"],
    }


def _ranked(entries: Sequence[Entry], kind: str) -> list[int]:
    """Indices of a kind's entries, the largest change first; equal changes stay in the order given."""
    return sorted((i for i, e in enumerate(entries) if e.kind == kind), key=lambda i: -abs(_rounded(entries[i])))


def _rounded(entry: Entry) -> float:
    """The change if it is one, so that unchanged entries are not sorted by rounding errors."""
    return 0.0 if entry.kind == "unchanged" else entry.change


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3g}"


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    """A reader, or a run that is killed, sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------- page


def _page(
    entries: Sequence[Entry],
    title: str,
    summary: Sequence[Sequence[str]],
    score_name: str,
    provenance: Mapping[str, str],
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("mmalign").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    sections = [
        {
            "kind": kind,
            "mark": _MARKS[kind],
            "heading": heading,
            "anchor": anchor,
            "order": order,
            "cards": [_card(entries[i], i) for i in _ranked(entries, kind)],
        }
        for kind, heading, anchor, order in _SECTIONS
    ]
    return template.render(
        title=title,
        summary=[[str(cell) for cell in row] for row in summary],
        score_name=score_name,
        provenance=provenance,
        sections=sections,
        total=len(entries),
        small=_largest(entries) <= _SMALL,
    )


def _card(entry: Entry, index: int) -> dict[str, object]:
    return {
        "id": f"picture-{index:04d}",
        "prompt": entry.prompt,
        "seed": entry.seed,
        "width": entry.before.width,
        "height": entry.before.height,
        "change": _number(_rounded(entry), "+"),
        **{"before_score": entry.before_score, "after_score": entry.after_score},
        **{"before_text": _number(entry.before_score), "after_text": _number(entry.after_score)},
        **{"before_note": entry.before_note, "after_note": entry.after_note},
        **{"before_uri": _data_uri(entry.before), "after_uri": _data_uri(entry.after)},
    }


def _data_uri(image: Image.Image) -> str:
    """Small pictures exactly (WebP is a third smaller than PNG there), large ones reduced: the page stays a few MB."""
    if max(image.size) <= _SMALL:
        content = _encode(image, "WEBP", lossless=True)
    else:
        reduced = image.copy()
        reduced.thumbnail((2 * _SMALL, 2 * _SMALL), Image.Resampling.LANCZOS)
        content = _encode(reduced, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def _largest(entries: Sequence[Entry]) -> int:
    return max(max(entry.before.size) for entry in entries)


# ------------------------------------------------------------------------------------------------------------- grid


def _choose(entries: Sequence[Entry], grid: int) -> dict[str, list[int]]:
    """At most `grid` indices: half gains, half losses, each taking the room that the other does not need."""
    gained, lost = _ranked(entries, "gained"), _ranked(entries, "lost")
    num_lost = min(len(lost), max(grid // 2, grid - len(gained)))
    chosen = {"gained": gained[: grid - num_lost], "lost": lost[:num_lost]}
    return chosen if gained or lost else {"unchanged": _ranked(entries, "unchanged")[:grid]}


def _draw_grid(
    entries: Sequence[Entry], title: str, summary: Sequence[Sequence[str]], score_name: str, grid: int
) -> Image.Image:
    """Title and counts, then a section of tiles for each kind, `_COLUMNS` wide."""
    chosen = _choose(entries, grid)
    unit = 1 if _largest(entries) <= _SMALL else 2  # everything scales with the pictures
    shown = [entries[i] for indices in chosen.values() for i in indices]
    num_lines = max(len(_wrap(e.prompt, _font(21 * unit), _Tile(unit).width)) for e in shown)
    tile = _Tile(unit, num_lines, any(e.before_note or e.after_note for e in shown))
    columns = min(_COLUMNS, max(2, *map(len, chosen.values())))
    margin, heading, gutter = 48 * unit, 84 * unit, 28 * unit
    width = 2 * margin + columns * tile.width + (columns - 1) * gutter
    lines = _header(entries, summary, score_name)
    top = margin + (52 + 32 * len(lines)) * unit
    num_rows = {kind: math.ceil(len(indices) / columns) for kind, indices in chosen.items()}
    height = top + sum(heading + n * (tile.height + gutter) for n in num_rows.values()) + margin - gutter
    canvas = Image.new("RGB", (width, height), _PAGE)
    brush = ImageDraw.Draw(canvas)
    room = width - 2 * margin
    _line(brush, (margin, margin), title, 38 * unit, _TEXT, room)
    for k, line in enumerate(lines):
        _line(brush, (margin, margin + (56 + 32 * k) * unit), line, 22 * unit, _MUTED, room)
    for kind, indices in chosen.items():
        number = sum(e.kind == kind for e in entries)
        label = next(heading for k, heading, *_ in _SECTIONS if k == kind)
        text = f"{label}  ·  {len(indices)} of {number}" if number else f"{label}  ·  none"
        _line(brush, (margin, top + 36 * unit), text, 26 * unit, _INK[kind][0], room)
        for k, index in enumerate(indices):
            across, down = k % columns, k // columns
            place = (margin + across * (tile.width + gutter), top + heading + down * (tile.height + gutter))
            tile.draw(canvas, brush, entries[index], place)
        top += heading + num_rows[kind] * (tile.height + gutter)
    return canvas


def _header(entries: Sequence[Entry], summary: Sequence[Sequence[str]], score_name: str) -> list[str]:
    """What the score is, how many gained and lost, and the summary's first line."""
    counts = ", ".join(f"{sum(e.kind == kind for e in entries)} {kind}" for kind in _MARKS)
    lines = ["Same prompts, same seeds, before and after.", f"Score: {score_name}.  ·  {counts}."]
    if len(summary) > 1:
        lines.append("  ·  ".join(f"{name}: {cell}" if name else cell for name, cell in zip(*summary[:2], strict=True)))
    return lines


@dataclass(frozen=True)
class _Tile:
    """A prompt over its two pictures, with scores, notes and the change below them."""

    unit: int
    num_lines: int = 1
    notes: bool = False

    @property
    def side(self) -> int:
        return _SMALL * self.unit

    @property
    def width(self) -> int:
        return 2 * self.side + 8 * self.unit

    @property
    def height(self) -> int:
        return self.side + (6 + 27 * self.num_lines + 34 + 24 * self.notes) * self.unit

    def draw(self, canvas: Image.Image, brush: ImageDraw.ImageDraw, entry: Entry, place: tuple[int, int]) -> None:
        x, y = place
        unit = self.unit
        lines = _wrap(entry.prompt, _font(21 * unit), self.width)
        for k, line in enumerate(lines):  # the last line always sits on the pictures
            _line(brush, (x, y + (self.num_lines - len(lines) + k) * 27 * unit), line, 21 * unit, _TEXT, self.width)
        y += (6 + 27 * self.num_lines) * unit
        sides = (
            (entry.before, "before", entry.before_score, entry.before_note, x),
            (entry.after, "after", entry.after_score, entry.after_note, x + self.side + 8 * unit),
        )
        for image, name, score, note, left in sides:
            canvas.paste(_fit(image, self.side), (left, y))
            brush.rectangle((left, y, left + self.side - 1, y + self.side - 1), outline=_LINE)
            below = y + self.side + 8 * unit
            _line(brush, (left, below), f"{name} {_number(score)}", 18 * unit, _TEXT, self.side)
            _line(brush, (left, below + 25 * unit), note, 16 * unit, _MUTED, self.side)
        _badge(brush, (x + self.width, y + self.side + 5 * unit), entry, unit)


def _badge(brush: ImageDraw.ImageDraw, corner: tuple[int, int], entry: Entry, unit: int) -> None:
    """The change in a pill whose top right is `corner`; a triangle says the direction without colour."""
    ink, soft = _INK[entry.kind]
    text, font = _number(_rounded(entry), "+"), _font(17 * unit)
    right, top = corner
    left = right - int(font.getlength(text)) - 36 * unit
    brush.rounded_rectangle((left, top, right - 1, top + 26 * unit), 13 * unit, fill=soft)
    x, y = left + 15 * unit, top + 13 * unit
    tip = {"gained": -5, "lost": 5, "unchanged": 0}[entry.kind] * unit
    brush.polygon([(x - 5 * unit, y - tip), (x + 5 * unit, y - tip), (x, y + tip)], fill=ink)
    brush.text((left + 26 * unit, y), text, fill=ink, font=font, anchor="lm")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a square: whole pixels if it must grow, smoothed if it must shrink."""
    square = Image.new("RGB", (side, side), _SURFACE)
    factor = side / max(image.size)
    factor = math.floor(factor) if factor >= 1 else factor
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    square.paste(image.convert("RGB").resize(size, method), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _line(brush: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: str, room: int) -> None:
    font = _font(size)
    brush.text(place, _shorten(_plain(text), font, room), fill=ink, font=font)


def _plain(text: str) -> str:
    """Pillow's font has ASCII and little else; accents go, other characters become "?" (the page shows them)."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c == "·" else "?" for c in bare.translate(_ASCII))


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    """One or two lines; the second may be too long, and is shortened where it is drawn."""
    words = _plain(text[:1000]).split()
    number = len(words)
    while number > 1 and font.getlength(" ".join(words[:number])) > room:
        number -= 1
    return [" ".join(part) for part in (words[:number], words[number:]) if part]
