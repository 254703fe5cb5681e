"""Halves of characters are refused where they are read, with their place."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.files import records
from mmalign.evaluation.benchmarks.base import RatedAnswer
from mmalign.pages import answers, pictures
from mmalign.pages.page import GalleryEntry, PageLayout, write_page
from mmalign.reading import broken_text, parse_json, printable

HALF = "a \ud83d b"
IMAGE = Image.new("RGB", (64, 64))
RATED = RatedAnswer("yes", 1.0, "right")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (HALF, "has half"),
        ({"chosen": [{"content": "a"}, {"content": HALF}]}, "chosen.1.content has half"),
        ({"a": {HALF: 1}}, "a.a key has half"),
        (["a", "b\udc00"], "1 has half"),
        ({"a": "😀 é \ufffd", "b": [1, None, {"c": "中"}]}, None),
    ],
)
def test_a_half_character_is_found_anywhere(value: object, place: str | None) -> None:
    reason = broken_text(value)
    assert reason is None if place is None else reason is not None and reason.startswith(place)
    assert reason is None or reason.encode()


def test_deep_values_are_no_trouble() -> None:
    deep: Any = HALF
    for _ in range(5000):
        deep = [deep]
    assert broken_text(deep) is not None
    assert printable(HALF) == "a \\ud83d b"


@pytest.mark.parametrize(
    "text", ['gallery: {title: "\\ud800"}', '"\\ud800": 1', 'data: {columns: {prompt: "\\udfff"}}']
)
def test_recipes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: {{name: sft}}\n{text}\n")
    with pytest.raises(ValueError, match=rf"{path}: .*has half of a character"):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"gallery\.title has half of a character"):
        load_recipe("configs/text_to_image/quickstart.yaml", ['gallery.title="\\udc80"'])


@pytest.mark.parametrize(
    "text", [b'["\\uD83D"]', b'["\\ud83d x"]', b'["\xed\xa0\xbd"]', '["\ud83d"]', '{"\\udc00": 1}']
)
def test_json(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has half of a character"):
        parse_json(text)
    assert parse_json(rb'["\ud83d\ude00"]') == ["😀"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows(name: str, tmp_path: Path) -> None:
    path, rows = tmp_path / name, ['{"prompt": "a"}', '{"prompt": ["b", "\\ud800"]}']
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else f"[{', '.join(rows)}]")
    with pytest.raises(ValueError, match=rf"^{name}.*prompt\.1 has half of a character"):
        list(records(path))


def picture(**texts: Any) -> GalleryEntry:
    return pictures.picture_entry(texts.get("prompt", "p"), 0, (IMAGE, IMAGE), (0, 1), ("", texts.get("note", "")))


def answer(text: str) -> GalleryEntry:
    return answers.answer_entry(IMAGE, "name", "question", "truth", RatedAnswer(text, 0, "note"), RATED)


@pytest.mark.parametrize(
    ("layout", "entry", "texts"),
    [
        (pictures.LAYOUT, picture(prompt=HALF), {}),
        (pictures.LAYOUT, picture(note=HALF), {}),
        (answers.LAYOUT, answer(HALF), {}),
        (pictures.LAYOUT, picture(), {"title": HALF}),
        (pictures.LAYOUT, picture(), {"provenance": {"model": HALF}}),
    ],
)
def test_pages_write_nothing(layout: PageLayout, entry: GalleryEntry, texts: dict[str, Any], tmp_path: Path) -> None:
    settings = {"title": "t", "summary": [], "score_name": "s", "provenance": {}, **texts}
    with pytest.raises(ValueError, match=r"^gallery: .* has half of a character \(\\ud83d\)"):
        write_page(tmp_path / "page", [entry], layout, **settings)
    assert not list(tmp_path.iterdir())
