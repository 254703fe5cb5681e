"""The page of pictures: what is written can be read back, sorts honestly, fetches nothing and runs no prompt."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.data.scenes import draw, lay_out, parse
from mmalign.page.files import write_page
from mmalign.page.pictures import LAYOUT, Entry
from mmalign.page.ranking import choose

SUMMARY = [("prompts fulfilled", "before, %", "after, %"), ("all", "27.3 [22.1, 33.1]", "33.2 [27.7, 39.2]")]


def entry(prompt: str, before: float, after: float, seed: int = 0, **notes: str) -> Entry:
    rng = np.random.default_rng(seed)
    first, second = (draw(lay_out(parse(c), rng)) for c in ("a red circle", "two blue stars"))
    return Entry(prompt, seed, first, second, before, after, **notes)


def write(folder: Path, entries: list[Entry], **changes: Any) -> Path:
    arguments = {"title": "t", "summary": SUMMARY, "score_name": "accuracy", "provenance": {"model": "tiny"}, **changes}
    return write_page(folder, entries, LAYOUT, **arguments)


FIVE = [
    entry("small gain", 0.5, 0.75, seed=1),
    entry("big loss", 1.0, 0.25, seed=2, before_note="correct", after_note="colour wrong"),
    entry("same", 0.5, 0.5 + 1e-9, seed=3),
    entry("big gain", 0.0, 1.0, seed=4),
    entry("small loss", 0.5, 0.4, seed=5),
]


class Page(HTMLParser):
    """Tags, and the prompts in the order and section in which a reader without a script meets them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[tuple[str | None, str | None]] = []
        self.section: str | None = None
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "section":
            self.section = values["id"]
        if tag == "article":
            self.prompts.append((self.section, values["data-title"]))


def test_plain_page_is_sorted(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "new" / "folder", FIVE))
    assert page.prompts == [
        ("best-gains", "big gain"),
        ("best-gains", "small gain"),
        ("worst-regressions", "big loss"),
        ("worst-regressions", "small loss"),
        ("unchanged", "same"),
    ]
    links = {values.get("href") for tag, values in page.tags if tag == "a"}
    ids = {values.get("id") for _, values in page.tags}
    assert {"#best-gains", "#worst-regressions", "#unchanged", "#provenance"} <= links
    assert {str(link)[1:] for link in links} <= ids


def test_page_holds_its_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, FIVE)
    page, text = Page(path), path.read_text()
    sources = [str(values["src"]) for tag, values in page.tags if tag == "img"]
    assert len(sources) == 10
    content = base64.b64decode(sources[0].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(content)) as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(FIVE[3].before))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object")]
    assert not [values for tag, values in page.tags if tag == "script" and "src" in values]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    alts = [str(values["alt"]) for tag, values in page.tags if tag == "img"]
    assert "after: big loss (seed 2), colour wrong" in alts
    assert "33.2 [27.7, 39.2]" in text and "<dt>model</dt><dd>tiny</dd>" in text


def test_prompts_are_text_and_never_markup(tmp_path: Path) -> None:
    """A prompt, note, title or provenance with markup shows as such: the tags are those of a harmless page."""
    evil = "</h3><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} 中 😀"
    plain = Page(write(tmp_path / "plain", [entry("p", 0, 1, before_note="n")]))
    path = write(
        tmp_path / "evil",
        [entry(evil, 0, 1, before_note=evil)],
        title=evil,
        score_name=evil,
        provenance={evil: evil},
        summary=[[evil] * 3, [evil] * 3],
    )
    page = Page(path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.prompts == [("best-gains", evil)]
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert json.loads((tmp_path / "evil" / "manifest.json").read_text())["entries"][0]["prompt"] == evil


def test_manifest_and_images(tmp_path: Path) -> None:
    write(tmp_path, FIVE)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"gained": 2, "lost": 2, "unchanged": 1}
    assert [record["prompt"] for record in manifest["entries"]] == [e.prompt for e in FIVE]  # the order given
    loss = manifest["entries"][1]
    assert (loss["seed"], loss["before_score"], loss["after_score"], loss["change"]) == (2, 1.0, 0.25, -0.75)
    assert (loss["before_note"], loss["after_note"], loss["kind"]) == ("correct", "colour wrong", "lost")
    with Image.open(tmp_path / loss["after_image"]) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(FIVE[1].after))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gallery.png", "images", "index.html", "manifest.json"]
    assert len(list((tmp_path / "images").iterdir())) == 10


def test_grid_shows_half_losses() -> None:
    gains, losses = [entry("g", 0, i + 1.0) for i in range(30)], [entry("l", i + 1.0, 0) for i in range(30)]
    chosen = choose([*gains, *losses], 24)
    assert chosen == {"gained": list(range(29, 17, -1)), "lost": list(range(59, 47, -1))}
    assert choose([*gains, *losses[:3]], 24)["lost"] == [32, 31, 30]  # the rest is room for gains
    assert len(choose([*gains[:2], *losses], 24)["lost"]) == 22
    assert choose(gains, 1) == {"gained": [29], "lost": []}
    assert choose([entry("s", 1, 1)] * 3, 2) == {"unchanged": [0, 1]}


def test_grid_enlarges_whole_pixels(tmp_path: Path) -> None:
    """A 64-pixel picture stands in the grid three times as large, each pixel a square of one colour."""
    write(tmp_path, FIVE[3:4])
    with Image.open(tmp_path / "gallery.png") as image:
        canvas = np.asarray(image)
    wanted = np.asarray(FIVE[3].after).repeat(3, axis=0).repeat(3, axis=1)[1:-1, 1:-1]  # the border is a line
    coloured = np.argwhere((wanted != 255).any(-1))
    (y0, x0), pixel = coloured[len(coloured) // 2], wanted[tuple(coloured[len(coloured) // 2])]
    places = np.argwhere((canvas == pixel).all(-1)) - (y0, x0)
    places = places[(places >= 0).all(1) & (places + wanted.shape[:2] <= canvas.shape[:2]).all(1)]
    height, width = wanted.shape[:2]
    assert any(np.array_equal(canvas[y : y + height, x : x + width], wanted) for y, x in places)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (640, 384)])
def test_any_size_and_mode(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (200, 10, 10, 255))
    page = Page(write(tmp_path, [Entry("word " * 200, 0, image, image, 0.1, -12345.678)], summary=[]))
    shown = next(values for tag, values in page.tags if tag == "img")
    assert (shown["width"], shown["height"]) == (str(size[0]), str(size[1]))
    assert not [tag for tag, _ in page.tags if tag == "table"]
    with Image.open(tmp_path / "gallery.png") as grid:
        assert grid.width < 2000 and grid.getpixel((0, 0)) != (200, 10, 10)


def test_large_galleries_stay_small(tmp_path: Path) -> None:
    """256 entries of 64 pixels: below 3 MB, the script and styles below 30 kB of it."""
    path = write(tmp_path, [entry("a red circle", i % 3, i % 2, seed=i) for i in range(256)])
    assert path.stat().st_size < 3_000_000
    assert len(re.sub(r"<article.*?</article>", "", path.read_text(), flags=re.S)) < 50_000
    assert len(Page(path).prompts) == 256


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
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, FIVE[:2])
    assert index.read_bytes() == old
    assert not list(tmp_path.rglob("*.partial"))


def test_refuses(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))
    with pytest.raises(ValueError, match="no entries"):
        write(tmp_path, [])
    with pytest.raises(ValueError, match=r"entry 1 \('p', seed 7\): \(64, 64\) before but \(128, 64\) after"):
        write(tmp_path, [FIVE[0], Entry("p", 7, small, large, 0, 1)])
    with pytest.raises(ValueError, match=r"entry 0 \('p', seed 7\): scores 0 and nan"):
        write(tmp_path, [Entry("p", 7, small, small, 0, float("nan"))])
    with pytest.raises(ValueError, match="scores inf and 1"):
        write(tmp_path, [Entry("p", 7, small, small, float("inf"), 1)])
    with pytest.raises(ValueError, match=r"rows of \[2, 1\] cells"):
        write(tmp_path, FIVE, summary=[("a", "b"), ("c",)])
    assert not list(tmp_path.iterdir())  # all is checked before anything is written
