"""Gallery of answers: inventions are marked for every reader, and an answer is text and never markup."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation.benchmarks.base import RatedAnswer
from mmalign.pages.answers import LAYOUT, Span, answer_entry, spans
from mmalign.pages.grid import INK
from mmalign.pages.page import GalleryEntry, write_page
from tests.helpers.page_reader import Page

SUMMARY = [("", "before", "after"), ("CHAIR_s, %", "40.0 [30.1, 49.9]", "20.0 [12.1, 29.9]")]
TEXT = "There is a red circle. There is a green cross."
INVENTED = RatedAnswer(TEXT, 0, "1 of 2 named, 1 invented", ((34, 45),))
RIGHT = RatedAnswer("There is a red circle. There is a blue star.", 2, "2 of 2 named, none invented")


def entry(
    before: RatedAnswer = INVENTED, after: RatedAnswer = RIGHT, name: str = "test-0-1", side: int = 64
) -> GalleryEntry:
    image = Image.new("RGB", (side, side), "white")
    return answer_entry(image, name, "What is in the picture?", "red circle, blue star", before, after)


def write(folder: Path, entries: list[GalleryEntry], **changes: Any) -> Path:
    arguments = {"title": "t", "summary": SUMMARY, "score_name": "named", "provenance": {"model": "tiny"}, **changes}
    return write_page(folder, entries, LAYOUT, **arguments)


def test_answer_is_cut_where_inventions_begin_and_end() -> None:
    assert spans(INVENTED) == [
        Span("There is a red circle. There is a ", False),
        Span("green cross", True),
        Span(".", False),
    ]
    assert spans(RatedAnswer("Yes.", 0, "wrong", ((0, 4),))) == [Span("Yes.", True)]
    assert spans(RatedAnswer("", 0, "")) == []
    both = RatedAnswer("a cat, a dog", 0, "", ((2, 5), (9, 12)))
    assert [span.text for span in spans(both) if span.invented] == ["cat", "dog"]
    assert "".join(span.text for span in spans(both)) == both.text


def test_page_marks_inventions_for_eye_and_ear(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry()]))
    assert page.marked == ["green cross"]
    assert page.answers == ["There is a red circle. There is a (not in the image: green cross).", RIGHT.text]
    assert re.search(r"mark \{[^}]*text-decoration: underline", page.text)  # not by colour alone


def test_page_names_an_empty_answer(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry(after=RatedAnswer("", 0, "0 of 2 named, none invented"))]))
    assert page.answers[1] == "(nothing)"


def test_page_escapes_markup(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} 中 😀"
    plain = Page(write(tmp_path / "plain", [entry()]))
    before, after = RatedAnswer(evil, 0, evil, ((3, 12),)), RatedAnswer(evil, 2, evil)
    attacked = answer_entry(Image.new("RGB", (64, 64)), evil, evil, evil, before, after)
    page = Page(write(tmp_path / "evil", [attacked]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert page.answers[1] == evil


def test_manifest_records_answers_and_images(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [entry(), entry(RIGHT, INVENTED, name="test-0-2", side=1000)]))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"gained": 1, "lost": 1, "unchanged": 0}
    first, second = manifest["entries"]
    assert (first["name"], first["question"], first["truth"]) == (
        "test-0-1",
        "What is in the picture?",
        "red circle, blue star",
    )
    assert first["before"]["text"] == TEXT and first["before"]["pieces"][1] == ["green cross", True]
    assert (first["before_score"], first["after_score"], first["change"], first["kind"]) == (0, 2, 2, "gained")
    with Image.open(tmp_path / first["image"]) as saved:
        assert saved.size == (64, 64)
    with Image.open(tmp_path / second["image"]) as saved:
        assert saved.size == (384, 384)  # as large as the page shows it
    assert all(source.startswith("data:image/webp;base64,") for source in page.values("img", "src"))


def test_picture_underlines_inventions_and_nothing_else(tmp_path: Path) -> None:
    ink = tuple(bytes.fromhex(INK["lost"].removeprefix("#")))

    def num_red(name: str, shown: GalleryEntry) -> int:
        write(tmp_path / name, [shown])
        with Image.open(tmp_path / name / "gallery.png") as image:
            return int((np.asarray(image) == ink).all(-1).sum())

    heading = num_red("unmarked", entry(before=RatedAnswer(TEXT, 0, "1 of 2 named, 1 invented")))
    width = 60  # pixels of "green cross" at least, two high, besides its letters
    assert num_red("marked", entry()) > heading + 2 * width


@pytest.mark.slow
@pytest.mark.parametrize("side", [1, 64, 640])
def test_answers_of_any_length_and_images_of_any_size(side: int, tmp_path: Path) -> None:
    long = RatedAnswer("word " * 400, 1, "note " * 50, ((0, 4),))
    write(tmp_path, [entry(before=long, after=long, side=side)] * 3, summary=[])
    with Image.open(tmp_path / "gallery.png") as grid:
        assert grid.width < 3200 and grid.height < 3200
