"""Places where fuzzed input once ended in a traceback or without end: each is told in a sentence."""

import logging
from pathlib import Path

import pytest

from mmalign.commands.load_recipe import MAX_BYTES, load_recipe
from mmalign.data.formats.files import document, find_image, records
from mmalign.pages.grid import Cell, Piece, Section, Text, Tile, render_grid
from mmalign.registry import import_callable

DEEP = "[" * 3000
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(ALIASES, "more than 16 aliases"), (DEEP, "nested too deeply"), ("#" * (MAX_BYTES + 1), "has more than")],
)
def test_recipes(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_recipe(path)


def test_a_recipe_without_end() -> None:
    with pytest.raises(ValueError, match="has more than"):
        load_recipe(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nested_json(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(DEEP * 40)
    with pytest.raises(ValueError, match="is not JSON"):
        list(records(tmp_path / name))
    with pytest.raises(ValueError, match="is not JSON"):
        document(tmp_path / name)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    assert find_image(tmp_path / "rows.jsonl", name, "rows.jsonl: line 1") == ""


def test_a_recipe_s_function_is_named_before_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmalign"):
        logging.getLogger("mmalign").addHandler(caplog.handler)
        import_callable("method.loss", "textwrap:dedent")
        logging.getLogger("mmalign").removeHandler(caplog.handler)
    assert "method.loss: this recipe runs textwrap:dedent from /" in caplog.text


def test_long_words_are_cut_where_a_line_ends() -> None:
    """What is not shown changes nothing."""
    pages = [
        render_grid("t", [], [Section([Tile([Cell([Text([Piece("w" * n)], num_lines=2)])])])], columns=1)
        for n in (200, 2000)
    ]
    assert pages[0].tobytes() == pages[1].tobytes()
