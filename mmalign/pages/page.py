"""Gallery files: `index.html` (one file that needs no network), `gallery.png`, `manifest.json` and `images/`.

The page and the PNG show the same numbers, and the manifest records them. The PNG's texts and entries are in the
manifest under `picture`; the texts are also in the PNG's metadata. Each kind of entry has a `PageLayout`, in `pictures`
and `answers`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
from PIL import Image

from mmalign import atomic_io
from mmalign.pages.grid import INK, SMALL, Piece, Section, Text, Tile, encode_grid, render_grid
from mmalign.pages.ranking import (
    MARKS,
    SECTIONS,
    Kind,
    Scores,
    choose,
    format_change,
    format_scores,
    kind,
    ranked,
    tally,
)
from mmalign.reading import broken_text


class _Share(NamedTuple):
    """The numbers of gains, losses and unchanged samples of a benchmark."""

    name: str
    counts: Mapping[Kind, int]


@dataclass(frozen=True)
class GalleryEntry:
    """A sample measured before and after alignment.

    Attributes:
        title: the prompt or the question.
        label: a text that distinguishes entries of one title, such as "seed 3".
        scores: the scores before and after; higher is better.
        notes: the scores in words, before and after; may be empty.
        images: the images, by their names in manifest.json and the template.
        details: other values for manifest.json and the template.
        tile: the entry in `gallery.png`.
    """

    title: str
    label: str
    scores: Scores
    notes: tuple[str, str]
    images: Mapping[str, Image.Image]
    details: Mapping[str, object]
    tile: Tile


@dataclass(frozen=True)
class PageLayout:
    """Presentation of a kind of entry.

    Attributes:
        template: the template in this folder that renders the entries.
        lead: an introduction to the entries, in a sentence or two.
        noun: a noun for an entry's title, such as "prompt".
        columns: the maximum number of tiles in a row.
        num_in_grid: the maximum number of entries in `gallery.png`: half best gains, half worst regressions.
    """

    template: str
    lead: str
    noun: str
    columns: int
    num_in_grid: int


def write_page(
    folder: Path,
    entries: Sequence[GalleryEntry],
    layout: PageLayout,
    *,
    title: str,
    summary: Sequence[Sequence[str]],
    score_name: str,
    provenance: Mapping[str, str],
    measured: Sequence[Scores] | None = None,
    benchmarks: Sequence[str] | None = None,
) -> Path:
    """Write the page of N entries, the manifest last, and return the path of its `index.html`.

    Other files in the folder are left alone.

    Args:
        folder: the target, created if missing.
        entries: [N] in any order; the page and the grid sort them by change.
        layout: presentation of the entries.
        title: the heading of the page and the grid.
        summary: rows of text, the header first; empty for no table.
        score_name: the meaning of the score.
        provenance: models, recipe and sampler, shown unchanged.
        measured: [M] the scores of all samples, if the entries are only some of them.
        benchmarks: [M] the benchmark of each of these samples, if there are several; each gets a bar of its own.

    Raises:
        ValueError: there is no entry, an entry's images differ in size, a score is not finite, a text has half of a
            character, or summary rows differ in length.
        CheckpointError: a file cannot be written; its old content stays.
    """
    _check(entries, summary)
    about = {"title": title, "score": score_name, "provenance": dict(provenance), "summary": list(map(list, summary))}
    if (reason := broken_text(about)) is not None:
        raise ValueError(f"gallery: {reason}")
    # Kinds of all samples, also of those without an entry
    measured = measured or [entry.scores for entry in entries]
    counts, shares = tally(measured), _tally_benchmarks(measured, benchmarks)
    atomic_io.make_folder("gallery", folder / "images")
    records = _write_images(folder, entries)
    picture, lines, chosen = _draw_picture(entries, layout, counts, shares, title, score_name, summary)
    _write(folder / "gallery.png", encode_grid(picture, lines))
    page = _page(
        entries,
        layout,
        counts,
        title=title,
        headline=headline(summary),
        shares=shares,
        summary=summary,
        score_name=score_name,
        provenance=provenance,
    )
    _write(folder / "index.html", page.encode())
    manifest = {**about, "counts": counts, "picture": {"lines": lines, "entries": chosen}, "entries": records}
    _write(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return folder / "index.html"


def _tally_benchmarks(measured: Sequence[Scores], benchmarks: Sequence[str] | None) -> list[_Share]:
    """Return the counts of each benchmark, in order of appearance; without benchmarks those of all."""
    by_benchmark: dict[str, list[Scores]] = {}
    for name, scores in zip(benchmarks or [""] * len(measured), measured, strict=True):
        by_benchmark.setdefault(name, []).append(scores)
    return [_Share(name, tally(scores)) for name, scores in by_benchmark.items()]


def _check(entries: Sequence[GalleryEntry], summary: Sequence[Sequence[str]]) -> None:
    if not entries:
        raise ValueError("gallery: no entries; expected at least one that was measured before and after")
    for index, entry in enumerate(entries):
        place = f"gallery: entry {index} ({entry.title[:60]!r}, {entry.label})"
        texts = {"title": entry.title, "label": entry.label, "notes": entry.notes, **entry.details}
        if (reason := broken_text(texts)) is not None:
            raise ValueError(f"gallery: entry {index}: {reason}")
        sizes = [image.size for image in entry.images.values()]
        if len(set(sizes)) > 1:
            raise ValueError(f"{place}: {sizes[0]} before but {sizes[1]} after; expected images of one size")
        if not all(map(math.isfinite, entry.scores)):
            raise ValueError(
                f"{place}: scores {entry.scores[0]} and {entry.scores[1]}; expected finite numbers; leave out entries "
                "without a score"
            )
    if len({len(row) for row in summary}) > 1:
        raise ValueError(f"gallery: summary rows of {[len(row) for row in summary]} cells; expected equal lengths")


def _draw_picture(
    entries: Sequence[GalleryEntry],
    layout: PageLayout,
    counts: Mapping[Kind, int],
    shares: Sequence[_Share],
    title: str,
    score_name: str,
    summary: Sequence[Sequence[str]],
) -> tuple[Image.Image, list[str], dict[Kind, list[int]]]:
    """Return the grid of the best gains and worst regressions, its texts, and the indices of its entries."""
    # Lines below the title
    lines = [layout.lead, f"Score: {score_name}."]
    for share in shares:
        tallied = ", ".join(f"{number:,} {name}" for name, number in share.counts.items())
        lines.append(f"{share.name}: {tallied}." if share.name else f"{tallied}.")
    if len(summary) > 1:
        lines.append("  ·  ".join(f"{name}: {cell}" if name else cell for name, cell in zip(*summary[:2], strict=True)))
    # Sections of the chosen entries
    chosen = choose([entry.scores for entry in entries], layout.num_in_grid)
    headings = {name: heading for name, heading, *_ in SECTIONS}
    sections = []
    for name, indices in chosen.items():
        shown = f"{len(indices)} of {counts[name]:,}" if counts[name] else "none"
        heading = Text([Piece(f"{headings[name]}  ·  {shown}", INK[name])], 26)
        sections.append(Section([entries[index].tile for index in indices], heading))
    unit = 1 if _is_small(entries) else 2  # all sizes scale with the images
    picture = render_grid(title, lines, sections, columns=layout.columns, unit=unit)
    return picture, [title, *lines], chosen


def _record(entry: GalleryEntry, names: Mapping[str, str]) -> dict[str, object]:
    """Return an entry's record for manifest.json."""
    (before, after), (before_note, after_note) = entry.scores, entry.notes
    return {
        **entry.details,
        "before_score": float(before),
        "after_score": float(after),
        "change": float(after - before),
        "kind": kind(entry.scores),
        "before_note": before_note,
        "after_note": after_note,
        **names,
    }


def headline(summary: Sequence[Sequence[str]]) -> str:
    """Return the first row of a summary as a sentence with the change's interval; empty without both sides."""
    if len(summary) < 2:
        return ""
    # Columns by their first word, as in "before, %"
    cells = {name.partition(",")[0].partition(" ")[0]: (name, cell) for name, cell in zip(*summary[:2], strict=True)}
    if not {"before", "after", "change"} <= cells.keys():
        return ""
    (before_name, before), (_, after), (_, change_cell) = (cells[name] for name in ("before", "after", "change"))
    # The first row is a measure, or of "all" what its first column measures
    first, of_row = summary[0][0], summary[1][0]
    name, _, unit = (first if of_row == "all" else of_row).partition(", ")
    unit = " %" if "%" in unit or "%" in before_name else ""
    # Only the change is shown with its interval
    values = [f"{cell.partition(' [')[0]}{unit}" for cell in (after, before)]
    estimate, bracket, interval = change_cell.partition(" [")
    points = " points" if unit else ""
    return f"{name[:1].upper()}{name[1:]}: {values[0]} instead of {values[1]} ({estimate}{points}{bracket}{interval})."


def _write_images(folder: Path, entries: Sequence[GalleryEntry]) -> list[dict[str, object]]:
    """Write the images of all entries, and return the entries' records for the manifest."""
    records = []
    for index, entry in enumerate(entries):
        names = {key: f"images/{index:04d}-{key.removesuffix('_image')}.png" for key in entry.images}
        for key, image in entry.images.items():
            _write(folder / names[key], _encode(image, "PNG"))
        records.append(_record(entry, names))
    return records


def _page(entries: Sequence[GalleryEntry], layout: PageLayout, counts: Mapping[Kind, int], **texts: object) -> str:
    """Return the HTML of the page; `texts` are further variables of the template."""
    measured = [entry.scores for entry in entries]
    sections = [
        {
            "kind": name,
            "mark": MARKS[name],
            "heading": heading,
            "anchor": anchor,
            "order": order,
            # The number is that of all samples, while only entries have cards
            "number": counts[name],
            "cards": [_card(entries[index], index) for index in ranked(measured, name)],
        }
        for name, heading, anchor, order in SECTIONS
    ]
    sections = [section for section in sections if section["number"]]
    return render(
        layout.template,
        lead=layout.lead,
        noun=layout.noun,
        sections=sections,
        marks=MARKS,
        small=_is_small(entries),
        **texts,
    )


def render(template: str, **variables: object) -> str:
    """Return the HTML of a template in this folder; texts are escaped, and every variable must be given."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    environment.filters["sha256"] = _sha256
    return environment.get_template(template).render(**variables)


def write_html(file: Path, template: str, **variables: object) -> None:
    """Write the HTML of a template to one file that needs no network; half of a character becomes a question mark.

    Raises:
        CheckpointError: the file cannot be written.
    """
    _write(file, render(template, **variables).encode("utf-8", "replace"))


def image_variables(name: str, image: Image.Image) -> dict[str, object]:
    """Return an image's variables for a template."""
    width, height = image.size
    return {"name": name, "uri": data_uri(image), "width": width, "height": height, "small": max(image.size) <= SMALL}


def _sha256(text: str) -> str:
    """Return the hash of an inline style or script, as a content policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _card(entry: GalleryEntry, index: int) -> dict[str, object]:
    """Return an entry's variables for a template."""
    (before, after), (before_note, after_note) = entry.scores, entry.notes
    first = next(iter(entry.images.values()))
    return {
        **entry.details,
        "id": f"entry-{index:04d}",
        "title": entry.title,
        "label": entry.label,
        "change": format_change(entry.scores),
        "width": first.width,
        "height": first.height,
        **{"before_score": before, "after_score": after, "before_note": before_note, "after_note": after_note},
        **dict(zip(("before_text", "after_text"), format_scores(entry.scores), strict=True)),
        **{key: data_uri(image) for key, image in entry.images.items()},
    }


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI in WebP: small images lossless (a third smaller than PNG), large ones reduced."""
    if max(image.size) <= SMALL:
        content = _encode(image, "WEBP", lossless=True)
    else:
        reduced = image.copy()
        reduced.thumbnail((2 * SMALL, 2 * SMALL), Image.Resampling.LANCZOS)
        content = _encode(reduced, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def _is_small(entries: Sequence[GalleryEntry]) -> bool:
    return all(max(image.size) <= SMALL for entry in entries for image in entry.images.values())


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    with atomic_io.atomic_write(path) as part:
        part.write_bytes(content)
