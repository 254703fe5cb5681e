"""Pictures in assets/gallery/: each agrees with its manifest, and the pages with both."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmalign

ROOT = Path(mmalign.__file__).parent.parent
GALLERY = ROOT / "assets" / "gallery"

if not (ROOT / "README.md").is_file():
    pytest.skip("no checkout: the installed package is under test", allow_module_level=True)

PICTURES = sorted(path.stem for path in GALLERY.glob("*.png"))
# A row of README's table of both quickstarts: the picture, and the row of its manifest's summary.
MEASURED = {
    "prompts fulfilled": ("quickstart", "all"),
    "CHAIR_s": ("quickstart_vision_language", "CHAIR_s, %"),
    "recall": ("quickstart_vision_language", "recall, %"),
    "POPE": ("quickstart_vision_language", "POPE accuracy, %"),
}


def manifest(name: str) -> Any:
    return json.loads((GALLERY / f"{name}.json").read_text(encoding="utf-8"))


def summary_row(name: str, label: str) -> dict[str, str]:
    """Return the cells of a row of a manifest's summary, by column."""
    columns, *rows = manifest(name)["summary"]
    return dict(zip(columns, next(row for row in rows if row[0] == label), strict=True))


def cell_of(row: dict[str, str], column: str) -> str:
    """Return the cell of the column whose name begins so."""
    return next(cell for name, cell in row.items() if name.startswith(column))


def test_every_picture_has_a_manifest() -> None:
    assert sorted(path.stem for path in GALLERY.glob("*.json")) == PICTURES
    assert {"quickstart", "quickstart_vision_language"} <= set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_the_one_of_its_manifest(name: str) -> None:
    content = (GALLERY / f"{name}.png").read_bytes()
    assert manifest(name)["picture"] == f"{name}.png"
    assert manifest(name)["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", PICTURES)
def test_picture_shows_the_lines_of_its_manifest(name: str) -> None:
    """Compare the text that the PNG carries, which is what was rendered, with the manifest and its numbers."""
    shown = manifest(name)
    with Image.open(GALLERY / f"{name}.png") as picture:
        assert picture.text["Description"] == "\n".join(shown["lines"])  # type: ignore[attr-defined]
    *_, score, counts, summary = shown["lines"]
    assert score == f"Score: {shown['score']}."
    assert counts == ", ".join(f"{number:,} {kind}" for kind, number in shown["counts"].items()) + "."
    assert all(cell in summary for cell in shown["summary"][1])


@pytest.mark.parametrize("name", PICTURES)
def test_picture_entries_are_its_best_and_worst(name: str) -> None:
    entries = manifest(name)["entries"]
    gains = [entry["change"] for entry in entries if entry["kind"] == "gained"]
    losses = [entry["change"] for entry in entries if entry["kind"] == "lost"]
    assert len(gains) + len(losses) == len(entries) > 0
    assert gains == sorted(gains, reverse=True) and losses == sorted(losses)
    assert all(entry["change"] == entry["after_score"] - entry["before_score"] for entry in entries)


def measured_rows() -> dict[str, list[str]]:
    """Return the cells of README's table of both quickstarts, by the words in MEASURED."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Measured\n")[2].partition("\n\n| times")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {word: cells for word in MEASURED for cells in rows if word in cells[0]}


@pytest.mark.parametrize("word", MEASURED)
def test_readme_has_the_numbers_of_the_picture(word: str) -> None:
    """Compare the base value and the change of seed 0."""
    name, label = MEASURED[word]
    row = summary_row(name, label)
    _, base, seed_0, *_ = measured_rows()[word]
    assert manifest(name)["seed"] == 0
    assert base == f"{cell_of(row, 'before').partition(' ')[0]} %"
    assert seed_0.strip("*") == cell_of(row, "change")


def test_readme_describes_the_first_picture() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    row = summary_row("quickstart_vision_language", "CHAIR_s, %")
    before, after = (row[side].partition(" ")[0] for side in ("before", "after"))
    assert f"from {before} % to {after} %" in text


def test_pages_show_shipped_pictures_only() -> None:
    """Find every picture on some page, and every shown picture among the shipped ones."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"assets/gallery/(\w+)\.png", page.read_text("utf-8"))}
    assert shown == set(PICTURES)
