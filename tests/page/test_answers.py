"""The page of answers: inventions are marked for every reader, and whatever a model says is text and never markup."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.page.answers import LAYOUT, Answer, Entry, Piece, _lines, _words, pieces
from mmalign.page.files import write_page
from mmalign.page.grid import INK

SUMMARY = [("", "before", "after"), ("CHAIR_s, %", "40.0 [30.1, 49.9]", "20.0 [12.1, 29.9]")]
SAID = "There is a red circle. There is a green cross."
INVENTED = Answer(SAID, 0, "1 of 2 named, 1 invented", ((34, 45),))
RIGHT = Answer("There is a red circle. There is a blue star.", 2, "2 of 2 named, none invented")


def entry(before: Answer = INVENTED, after: Answer = RIGHT, name: str = "test-0-1", side: int = 64) -> Entry:
    picture = Image.new("RGB", (side, side), "white")
    return Entry(picture, name, "What is in the picture?", "red circle, blue star", before, after)


def write(folder: Path, entries: list[Entry], **changes: Any) -> Path:
    arguments = {"title": "t", "summary": SUMMARY, "score_name": "named", "provenance": {"model": "tiny"}, **changes}
    return write_page(folder, entries, LAYOUT, **arguments)


class Page(HTMLParser):
    """Tags, the cards by section, the answers as a screen reader reads them, and what one who looks sees marked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        text = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[tuple[str | None, str | None]] = []
        self.section: str | None = None
        self.heard = [told(p) for p in re.findall(r'<div class="answer">.*?<p>(.*?)</p>', text, re.DOTALL)]
        marks = re.findall(r"<mark>(.*?)</mark>", text, re.DOTALL)
        self.marked = [told(re.sub(r'<span class="hush">.*?</span>', "", mark)) for mark in marks]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "section":
            self.section = values["id"]
        if tag == "article":
            self.cards.append((self.section, values["data-after"]))


def told(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


# ----------------------------------------------------------------------------------------------------------- the pieces


def test_an_answer_is_cut_where_inventions_begin_and_end() -> None:
    assert pieces(INVENTED) == [
        Piece("There is a red circle. There is a ", False),
        Piece("green cross", True),
        Piece(".", False),
    ]
    assert pieces(Answer("Yes.", 0, "wrong", ((0, 4),))) == [Piece("Yes.", True)]
    assert pieces(Answer("", 0, "")) == []
    both = Answer("a cat, a dog", 0, "", ((2, 5), (9, 12)))
    assert [piece.text for piece in pieces(both) if piece.invented] == ["cat", "dog"]
    assert "".join(piece.text for piece in pieces(both)) == both.text


def test_words_of_the_grid_keep_their_stops_and_their_marks() -> None:
    words = _words(INVENTED)
    assert ["".join(piece.text for piece in word) for word in words] == SAID.split()
    assert words[-2:] == [[Piece("green", True)], [Piece("cross", True), Piece(".", False)]]
    assert _words(Answer("", 0, "")) == [[Piece("(nothing)", False)]]


def test_long_answers_are_cut_in_the_grid() -> None:
    lines = _lines(Answer("word " * 500, 0, ""), 1)
    assert len(lines) == 6 and lines[-1][-1] == [Piece("...", False)]


# ------------------------------------------------------------------------------------------------------------- the page


def test_inventions_are_seen_and_heard(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry()]))
    assert page.marked == ["green cross"]
    assert page.heard[0] == "There is a red circle. There is a (not in the image: green cross)."
    assert page.heard[1] == RIGHT.text
    styles = (tmp_path / "index.html").read_text()
    assert re.search(r"mark \{[^}]*text-decoration: underline", styles)  # not by colour alone


def test_losses_stand_beside_gains(tmp_path: Path) -> None:
    """Each section is sorted by the size of its change, and both are linked from the top."""
    worse = Answer("a", -3, "")
    page = Page(write(tmp_path, [entry(), entry(RIGHT, INVENTED), entry(RIGHT, worse), entry(RIGHT, RIGHT)]))
    assert page.cards == [
        ("best-gains", "2"),
        ("worst-regressions", "-3"),
        ("worst-regressions", "0"),
        ("unchanged", "2"),
    ]
    links = {values.get("href") for tag, values in page.tags if tag == "a"}
    assert {"#best-gains", "#worst-regressions", "#unchanged", "#provenance"} <= links
    assert {str(link)[1:] for link in links} <= {values.get("id") for _, values in page.tags}


def test_an_empty_answer_says_so(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry(after=Answer("", 0, "0 of 2 named, none invented"))]))
    assert page.heard[1] == "(nothing)"


def test_answers_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} 中 😀"
    plain = Page(write(tmp_path / "plain", [entry()]))
    said = Answer(evil, 0, evil, ((3, 12),))
    attacked = Entry(entry().image, evil, evil, evil, said, Answer(evil, 2, evil))
    path = write(
        tmp_path / "evil",
        [attacked],
        title=evil,
        score_name=evil,
        provenance={evil: evil},
        summary=[[evil] * 3, [evil] * 3],
    )
    page = Page(path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert page.heard[1] == evil


def test_the_page_fetches_nothing_and_holds_its_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, [entry(), entry(side=400)])
    page, text = Page(path), path.read_text()
    sources = [str(values["src"]) for tag, values in page.tags if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    assert not [values for tag, values in page.tags if tag == "script" and "src" in values]


def test_manifest_and_images(tmp_path: Path) -> None:
    write(tmp_path, [entry(), entry(RIGHT, INVENTED, name="test-0-2", side=1000)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"gained": 1, "lost": 1, "unchanged": 0}
    first, second = manifest["entries"]
    assert (first["name"], first["question"], first["truth"]) == (
        "test-0-1",
        "What is in the picture?",
        "red circle, blue star",
    )
    assert first["before"]["text"] == SAID and first["before"]["pieces"][1] == ["green cross", True]
    assert (first["before_score"], first["after_score"], first["change"], first["kind"]) == (0, 2, 2, "gained")
    with Image.open(tmp_path / first["image"]) as saved:
        assert saved.size == (64, 64)
    with Image.open(tmp_path / second["image"]) as saved:
        assert saved.size == (384, 384)  # as large as the page shows it


def test_what_is_not_shown_is_counted(tmp_path: Path) -> None:
    """A page of the extremes says how many gained and lost of all that was measured, and of how many it shows some."""
    path = write(tmp_path, [entry(), entry(RIGHT, INVENTED)], measured=[(0, 1)] * 1200 + [(1, 0)] + [(1, 1)] * 7)
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"] == {"gained": 1200, "lost": 1, "unchanged": 7}
    text = told(path.read_text())
    assert "1 of 1,200, largest gain first." in text and "1 of 1, largest loss first." in text
    assert "0 of 7, in the order measured.\nNone of them is shown." in text


def test_the_grid_underlines_what_is_invented_and_nothing_else(tmp_path: Path) -> None:
    ink = tuple(bytes.fromhex(INK["lost"][0].removeprefix("#")))

    def red_in(name: str, *entries: Entry) -> int:
        write(tmp_path / name, list(entries))
        with Image.open(tmp_path / name / "gallery.png") as image:
            return int((np.asarray(image) == ink).all(-1).sum())

    fair = Answer(SAID, 0, "1 of 2 named, 1 invented")
    heading = red_in("unmarked", entry(before=fair))  # "Worst regressions  ·  none"
    width = 60  # pixels of "green cross" at least, two high, besides its letters
    assert red_in("marked", entry()) > heading + 2 * width


@pytest.mark.parametrize("side", [1, 64, 640])
def test_any_size(side: int, tmp_path: Path) -> None:
    long = Answer("word " * 400, 1, "note " * 50, ((0, 4),))
    write(tmp_path, [entry(before=long, after=long, side=side)] * 3, summary=[])
    with Image.open(tmp_path / "gallery.png") as grid:
        assert grid.width < 3200


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"entry 0 \('What is in the picture\?', test-0-1\): scores 0 and nan"):
        write(tmp_path, [entry(after=Answer("", float("nan"), ""))])
    with pytest.raises(ValueError, match="no entries"):
        write(tmp_path, [])
    assert not list(tmp_path.iterdir())
    assert LAYOUT.noun == "question"
