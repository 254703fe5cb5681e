"""Places where fuzzed input once ended in a traceback or without end: each is told in a sentence."""

from pathlib import Path

import pytest

from mmalign.commands.load_recipe import MAX_BYTES, load_recipe
from mmalign.data.formats.files import document, records
from mmalign.data.formats.image_files import ImageReader
from mmalign.data.pairs import UnusableRowError
from mmalign.pages.grid import Cell, Piece, Section, Text, Tile, render_grid
from mmalign.registry import import_callable

DEEP = "[" * 3000
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(ALIASES, "more than 16 aliases"), (DEEP, "nested too deeply"), ("#" * (MAX_BYTES + 1), "more than 1,048,576")],
)
def test_recipes(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_recipe(path)


def test_a_recipe_without_end() -> None:
    with pytest.raises(ValueError, match="not a regular file"):
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
    with pytest.raises(UnusableRowError, match="does not exist"):
        ImageReader().check(name, [tmp_path])


def test_user_function_is_named_before_its_module_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rules_of_a_stranger.py").write_text("raise ImportError('its code ran')")
    with pytest.raises(ValueError, match="its code ran"):
        import_callable("method.mixed.annotator", "rules_of_a_stranger:rate")
    assert log_lines == [
        f"method.mixed.annotator: this recipe runs rules_of_a_stranger:rate from {tmp_path}/rules_of_a_stranger.py"
    ]


def test_long_words_are_cut_where_a_line_ends() -> None:
    """Text beyond what fits does not change the lines."""
    pages = [
        render_grid("t", [], [Section([Tile([Cell([Text([Piece("w" * n)], num_lines=2)])])])], columns=1)
        for n in (200, 2000)
    ]
    assert pages[0].tobytes() == pages[1].tobytes()
