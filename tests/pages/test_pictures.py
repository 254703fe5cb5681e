"""Gallery of images: its page sorts honestly, fetches nothing and runs no prompt; its manifest and picture agree."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.atomic_io import CheckpointError
from mmalign.pages.page import GalleryEntry, headline, write_page
from mmalign.pages.pictures import LAYOUT, picture_entry
from mmalign.toy.scenes import parse, place_objects, render
from tests.helpers.page_reader import Page, visible

SUMMARY = [("prompts fulfilled", "before, %", "after, %"), ("all", "27.3 [22.1, 33.1]", "33.2 [27.7, 39.2]")]


def entry(prompt: str, before: float, after: float, seed: int = 0, notes: tuple[str, str] = ("", "")) -> GalleryEntry:
    rng = np.random.default_rng(seed)
    images = [render(place_objects(parse(caption), rng)) for caption in ("a red circle", "two blue stars")]
    return picture_entry(prompt, seed, images, (before, after), notes)


def write(folder: Path, entries: list[GalleryEntry], **changes: Any) -> Path:
    arguments = {"title": "t", "summary": SUMMARY, "score_name": "accuracy", "provenance": {"model": "tiny"}, **changes}
    return write_page(folder, entries, LAYOUT, **arguments)


FIVE = [
    entry("small gain", 0.5, 0.75, seed=1),
    entry("big loss", 1.0, 0.25, seed=2, notes=("correct", "colour wrong")),
    entry("same", 0.5, 0.5 + 1e-9, seed=3),
    entry("big gain", 0.0, 1.0, seed=4),
    entry("small loss", 0.5, 0.4, seed=5),
]


def test_page_is_sorted_without_a_script(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "new" / "folder", FIVE))
    assert page.cards == [
        ("best-gains", "big gain"),
        ("best-gains", "small gain"),
        ("worst-regressions", "big loss"),
        ("worst-regressions", "small loss"),
        ("unchanged", "same"),
    ]
    links = set(page.values("a", "href"))
    assert {"#best-gains", "#worst-regressions", "#unchanged", "#provenance"} <= links
    assert {link[1:] for link in links} <= {values.get("id") for _, values in page.tags}


def test_page_holds_its_images_and_fetches_nothing(tmp_path: Path) -> None:
    page = Page(write(tmp_path, FIVE))
    sources = page.values("img", "src")
    assert len(sources) == 10
    content = base64.b64decode(sources[0].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(content)) as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(FIVE[3].images["before_image"]))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object")]
    assert not page.values("script", "src")
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page.text)
    assert "after: big loss (seed 2), colour wrong" in page.values("img", "alt")
    assert "33.2 [27.7, 39.2]" in page.text and "<dt>model</dt><dd>tiny</dd>" in page.text


def test_page_escapes_markup(tmp_path: Path) -> None:
    """A prompt, note, title or provenance with markup shows as such: the tags are those of a harmless page."""
    evil = "</h3><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} 中 😀"
    plain = Page(write(tmp_path / "plain", [entry("p", 0, 1, notes=("n", ""))]))
    path = write(
        tmp_path / "evil",
        [entry(evil, 0, 1, notes=(evil, ""))],
        title=evil,
        score_name=evil,
        provenance={evil: evil},
        summary=[[evil] * 3, [evil] * 3],
    )
    page = Page(path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.cards == [("best-gains", evil)]
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert json.loads((tmp_path / "evil" / "manifest.json").read_text())["entries"][0]["prompt"] == evil


def test_page_counts_entries_that_it_does_not_show(tmp_path: Path) -> None:
    """The counts are of all that was measured, on the page and in the picture."""
    measured = [(0, 1)] * 1200 + [(1, 0)] + [(1, 1)] * 7
    path = write(tmp_path, [entry("a", 0, 1), entry("b", 1, 0)], measured=measured)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"gained": 1200, "lost": 1, "unchanged": 7}
    assert "1,200 gained, 1 lost, 7 unchanged." in manifest["picture"]["lines"]
    text = visible(path.read_text())
    assert "1 of 1,200, largest gain first." in text and "1 of 1, largest loss first." in text
    assert "0 of 7, in the order measured.\nNone of them is shown." in text


def test_page_begins_with_the_result_and_a_bar_for_each_benchmark(tmp_path: Path) -> None:
    """Without a bar of their own, 3,072 yes/no questions hide 256 descriptions."""
    summary = [
        ("", "before", "after", "change [95 % interval]"),
        ("CHAIR_s, %", "41.0 [1, 2]", "18.3 [1, 2]", "-22.7 [-28.1, -17.2]"),
    ]
    measured, benchmarks = [(0, 1)] * 3 + [(1, 1)] * 5, ["descriptions"] * 4 + ["yes/no questions"] * 4
    path = write(tmp_path, [entry("a", 0, 1)], measured=measured, benchmarks=benchmarks, summary=summary)
    page, text = Page(path), visible(path.read_text())
    lines = json.loads((tmp_path / "manifest.json").read_text())["picture"]["lines"]
    assert "descriptions: 3 gained, 0 lost, 1 unchanged." in lines
    assert "yes/no questions: 0 gained, 0 lost, 4 unchanged." in lines
    assert "CHAIR_s: 18.3\u00a0% instead of 41.0\u00a0% (-22.7 points [-28.1, -17.2])." in text
    assert [values["class"] for tag, values in page.tags if tag == "div" and "share-" in str(values.get("class"))] == [
        "share share-1",
        "share share-2",
    ]
    assert ".share-1 .gained { flex: 3; } .share-1 .unchanged { flex: 1; }" in page.text
    assert ".share-2 .unchanged { flex: 4; }" in page.text and ".share-2 .gained" not in page.text


def test_headline_of_a_table_of_prompts() -> None:
    header = ("prompts fulfilled", "images", "before, %", "after, %", "change, points [95 % interval]")
    row = ("all", "512", "27.3 [22.1, 33.1]", "33.2 [27.7, 39.2]", "+5.9 [1.1, 10.7]")
    assert headline([header, row]) == "Prompts fulfilled: 33.2 % instead of 27.3 % (+5.9 points [1.1, 10.7])."
    assert headline([]) == headline([("score", "mean"), ("all", "3")]) == ""


def test_page_has_no_empty_section(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry("a", 0, 1)]))
    assert [values["id"] for tag, values in page.tags if tag == "section"] == ["best-gains", "sorted"]
    assert page.values("button", "data-filter") == ["all", "gained"]


def test_manifest_records_entries_and_images(tmp_path: Path) -> None:
    write(tmp_path, FIVE)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"gained": 2, "lost": 2, "unchanged": 1}
    assert [record["prompt"] for record in manifest["entries"]] == [e.title for e in FIVE]  # the order given
    loss = manifest["entries"][1]
    assert (loss["seed"], loss["before_score"], loss["after_score"], loss["change"]) == (2, 1.0, 0.25, -0.75)
    assert (loss["before_note"], loss["after_note"], loss["kind"]) == ("correct", "colour wrong", "lost")
    with Image.open(tmp_path / loss["after_image"]) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(FIVE[1].images["after_image"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.png", "images", "index.html", "manifest.json"]
    assert len(list((tmp_path / "images").iterdir())) == 10


def test_picture_carries_the_texts_of_its_manifest(tmp_path: Path) -> None:
    write(tmp_path, FIVE, title="Träume")
    picture = json.loads((tmp_path / "manifest.json").read_text())["picture"]
    assert picture["lines"] == [
        "Träume",
        LAYOUT.lead,
        "Score: accuracy.",
        "2 gained, 2 lost, 1 unchanged.",
        "prompts fulfilled: all  ·  before, %: 27.3 [22.1, 33.1]  ·  after, %: 33.2 [27.7, 39.2]",
    ]
    assert picture["entries"] == {"gained": [3, 0], "lost": [1, 4]}
    with Image.open(tmp_path / "gallery.png") as image:
        assert image.info["Description"].split("\n") == picture["lines"]


def test_picture_enlarges_whole_pixels(tmp_path: Path) -> None:
    """A 64-pixel image stands in the picture three times as large, each pixel a square of one colour."""
    write(tmp_path, FIVE[3:4])
    with Image.open(tmp_path / "gallery.png") as image:
        canvas = np.asarray(image)
    expected = np.asarray(FIVE[3].images["after_image"]).repeat(3, axis=0).repeat(3, axis=1)
    coloured = np.argwhere((expected != 255).any(-1))
    (y0, x0), pixel = coloured[len(coloured) // 2], expected[tuple(coloured[len(coloured) // 2])]
    places = np.argwhere((canvas == pixel).all(-1)) - (y0, x0)
    places = places[(places >= 0).all(1) & (places + expected.shape[:2] <= canvas.shape[:2]).all(1)]
    height, width = expected.shape[:2]
    assert any(np.array_equal(canvas[y : y + height, x : x + width], expected) for y, x in places)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (640, 384)])
def test_images_of_any_size_and_mode(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (200, 10, 10, 255))
    for name, prompt in (("words", "word " * 200), ("letters", "x" * 500)):
        entries = [picture_entry(prompt, 0, (image, image), (0.1, -12345.678))]
        page = Page(write(tmp_path / name, entries, summary=[]))
        shown = next(values for tag, values in page.tags if tag == "img")
        assert (shown["width"], shown["height"]) == (str(size[0]), str(size[1]))
        assert not [tag for tag, _ in page.tags if tag == "table"]
        with Image.open(tmp_path / name / "gallery.png") as grid:
            assert grid.width < 2000 and grid.getpixel((0, 0)) != (200, 10, 10)


@pytest.mark.slow
def test_large_galleries_stay_small(tmp_path: Path) -> None:
    """256 entries of 64 pixels: below 3 MB, the script and styles below 50 kB of it."""
    path = write(tmp_path, [entry("a red circle", i % 3, i % 2, seed=i) for i in range(256)])
    assert path.stat().st_size < 3_000_000
    assert len(re.sub(r"<article.*?</article>", "", path.read_text(), flags=re.S)) < 50_000
    assert len(Page(path).cards) == 256


def test_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write(tmp_path, FIVE)
    old = index.read_bytes()
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "index.html" in path.name:
            whole(path, content[:100])
            raise OSError(28, "No space left on device")
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, FIVE[:2])
    assert index.read_bytes() == old
    assert not list(tmp_path.rglob(".*"))


SMALL, LARGE = Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))


@pytest.mark.parametrize(
    ("entries", "changes", "error"),
    [
        ([], {}, "no entries"),
        (
            [FIVE[0], picture_entry("p", 7, (SMALL, LARGE), (0, 1))],
            {},
            r"entry 1 \('p', seed 7\): \(64, 64\) before but \(128, 64\) after",
        ),
        ([picture_entry("p", 7, (SMALL, SMALL), (0, float("nan")))], {}, r"entry 0 \('p', seed 7\): scores 0 and nan"),
        ([picture_entry("p", 7, (SMALL, SMALL), (float("inf"), 1))], {}, "scores inf and 1"),
        (FIVE, {"summary": [("a", "b"), ("c",)]}, r"rows of \[2, 1\] cells"),
    ],
)
def test_page_refuses(entries: list[GalleryEntry], changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        write(tmp_path, entries, **changes)
    assert not list(tmp_path.iterdir())  # all is checked before anything is written


def test_an_edit_is_shown_beside_its_source(tmp_path: Path) -> None:
    plain, source = entry("a", 0.0, 1.0), Image.new("RGB", (64, 64), "red")
    images = list(plain.images.values())
    source = source.resize(images[0].size)
    edit = picture_entry("a", 0, images, (0.0, 1.0), ("", ""), source)
    assert [cell.texts[0].pieces[0].text.split()[0] for cell in edit.tile.cells] == ["source", "before", "after"]
    path = write(tmp_path, [edit])
    record = json.loads((tmp_path / "manifest.json").read_text())["entries"][0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / record["source_image"])), np.asarray(source))
    assert [alt.partition(":")[0] for alt in Page(path).values("img", "alt")] == ["source", "before", "after"]
    assert [alt.partition(":")[0] for alt in Page(write(tmp_path, [plain])).values("img", "alt")] == ["before", "after"]
