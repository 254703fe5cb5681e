"""A page's files: `index.html` (one file that needs no network), `gallery.png`, `manifest.json` and `images/`.

What one entry looks like is a `Layout`; `pictures` and `answers` have one each.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import jinja2
from PIL import Image

from mmalign.page.grid import SMALL, E, Tiles, draw_grid, header
from mmalign.page.ranking import MARKS, SECTIONS, Kind, change, kind, ranked, shown, tally


@dataclass(frozen=True)
class Layout(Generic[E]):
    """What an entry of a kind looks like.

    Attributes:
        template: the file beside this one that shows the entries.
        lead: what the entries have in common, in a sentence.
        noun: what an entry's title is: "prompt".
        images: an entry's pictures, by their names in manifest.json and the template.
        describe: the rest of it, for manifest.json and the template.
        label: what tells an entry from others of its title: "seed 3".
        tiles: how it is drawn in the grid.
        grid: the largest number of entries in `gallery.png`: half best gains, half worst regressions.
    """

    template: str
    lead: str
    noun: str
    images: Callable[[E], dict[str, Image.Image]]
    describe: Callable[[E], dict[str, Any]]
    label: Callable[[E], str]
    tiles: Tiles[E]
    grid: int


def write_page(
    folder: Path,
    entries: Sequence[E],
    layout: Layout[E],
    *,
    title: str,
    summary: Sequence[Sequence[str]],
    score_name: str,
    provenance: Mapping[str, str],
    measured: Sequence[tuple[float, float]] | None = None,
) -> Path:
    """Write the page of N entries and return the path of its `index.html`.

    A file appears whole or not at all, the manifest last. Other files in the folder stay as they are.

    Args:
        folder: where to write; made if it is not there.
        entries: [N] in any order; the page and the grid sort them by change.
        layout: what an entry looks like.
        title: the heading of the page and the grid.
        summary: rows of text, the header first, such as `SceneComparison.table()`; empty for no table.
        score_name: what the score is, in words.
        provenance: what made the entries (models, recipe, sampler), shown as it is.
        measured: [M] the scores of all that was measured, before and after, where the entries are a part of it.

    Raises:
        ValueError: no entry, scores that cannot be compared, or an uneven summary.
        OSError: a file cannot be written.
    """
    _check(entries, layout, summary)
    counts = tally(measured or [entry.scores for entry in entries])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i, entry in enumerate(entries):
        images = layout.images(entry)
        names = {key: f"images/{i:04d}-{key.removesuffix('_image')}.png" for key in images}
        for key, image in images.items():
            _write(folder / names[key], _encode(image, "PNG"))
        records.append(_record(entry, layout, names))
    unit = 1 if _is_small(entries, layout) else 2  # everything in the grid scales with the pictures
    lines = header(counts, layout.lead, score_name, summary)
    canvas = draw_grid(entries, title, lines, counts, layout.tiles, number=layout.grid, unit=unit)
    _write(folder / "gallery.png", _encode(canvas, "PNG"))
    _write(folder / "index.html", _page(entries, counts, layout, title, summary, score_name, provenance).encode())
    manifest = {
        "title": title,
        "score": score_name,
        "provenance": dict(provenance),
        "summary": [list(row) for row in summary],
        "counts": counts,
        "entries": records,
    }
    _write(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return folder / "index.html"


def _check(entries: Sequence[E], layout: Layout[E], summary: Sequence[Sequence[str]]) -> None:
    if not entries:
        raise ValueError("gallery: no entries; expected at least one that was measured before and after")
    for i, entry in enumerate(entries):
        where = f"gallery: entry {i} ({entry.title[:60]!r}, {layout.label(entry)})"
        sizes = [image.size for image in layout.images(entry).values()]
        if len(set(sizes)) > 1:
            raise ValueError(f"{where}: {sizes[0]} before but {sizes[1]} after; expected pictures of one size")
        if not all(map(math.isfinite, entry.scores)):
            raise ValueError(
                f"{where}: scores {entry.scores[0]} and {entry.scores[1]}; expected finite numbers, "
                "so leave out what could not be judged"
            )
    if len({len(row) for row in summary}) > 1:
        raise ValueError(f"gallery: summary rows of {[len(row) for row in summary]} cells; expected as many in each")


def _record(entry: E, layout: Layout[E], names: Mapping[str, str]) -> dict[str, Any]:
    (before, after), (before_note, after_note) = entry.scores, entry.notes
    return {
        **layout.describe(entry),
        "before_score": float(before),
        "after_score": float(after),
        "change": float(after - before),
        "kind": kind(entry),
        "before_note": before_note,
        "after_note": after_note,
        **names,
    }


def _page(
    entries: Sequence[E],
    counts: Mapping[Kind, int],
    layout: Layout[E],
    title: str,
    summary: Sequence[Sequence[str]],
    score_name: str,
    provenance: Mapping[str, str],
) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    sections = [
        {
            "kind": which,
            "mark": MARKS[which],
            "heading": heading,
            "anchor": anchor,
            "order": order,
            "number": counts[which],
            "cards": [_card(entries[i], layout, i) for i in ranked(entries, which)],
        }
        for which, heading, anchor, order in SECTIONS
    ]
    return environment.get_template(layout.template).render(
        title=title,
        lead=layout.lead,
        noun=layout.noun,
        summary=[[str(cell) for cell in row] for row in summary],
        score_name=score_name,
        provenance=provenance,
        sections=sections,
        small=_is_small(entries, layout),
    )


def _card(entry: E, layout: Layout[E], index: int) -> dict[str, Any]:
    """What a template knows of an entry."""
    (before, after), (before_note, after_note), images = entry.scores, entry.notes, layout.images(entry)
    first = next(iter(images.values()))
    return {
        **layout.describe(entry),
        "id": f"entry-{index:04d}",
        "title": entry.title,
        "label": layout.label(entry),
        "change": shown(change(entry), "+"),
        "width": first.width,
        "height": first.height,
        **{"before_score": before, "after_score": after, "before_note": before_note, "after_note": after_note},
        **{"before_text": shown(before), "after_text": shown(after)},
        **{key: _data_uri(image) for key, image in images.items()},
    }


def _data_uri(image: Image.Image) -> str:
    """Small pictures exactly (WebP is a third smaller than PNG there), large ones reduced: the page stays a few MB."""
    if max(image.size) <= SMALL:
        content = _encode(image, "WEBP", lossless=True)
    else:
        reduced = image.copy()
        reduced.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)
        content = _encode(reduced, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def _is_small(entries: Sequence[E], layout: Layout[E]) -> bool:
    return all(max(image.size) <= SMALL for entry in entries for image in layout.images(entry).values())


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
