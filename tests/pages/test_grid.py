"""Texts of picture pages, wrapped into lines."""

from itertools import pairwise

import pytest
from PIL import ImageFont

from mmalign.pages.grid import Piece, Text, wrapped


def lines(text: str, room: int, size: int = 16, num_lines: int = 3) -> list[str]:
    return ["".join(piece.text for piece in line) for line in wrapped(Text([Piece(text)], size, num_lines), room)]


def test_a_wide_name_continues_after_an_underscore() -> None:
    """As the name of a method above a column of 128 pixels."""
    assert lines("diffusion_online_dpo", 128) == ["diffusion_online_", "dpo"]
    assert lines("see diffusion_online_dpo", 128) == ["see ", "diffusion_online_", "dpo"]
    assert lines("diffusion_dpo", 128) == ["diffusion_dpo"]


@pytest.mark.parametrize("word", ["w" * 40, "step_" * 12, "_" * 60])
def test_all_letters_of_a_wide_word_are_shown(word: str) -> None:
    shown = lines(word, 128, num_lines=20)
    font = ImageFont.load_default(16)
    assert "".join(shown) == word and all(font.getlength(line) <= 128 for line in shown)
    assert all(font.getlength(a + b) > 128 for a, b in pairwise(shown))


def test_a_text_with_too_many_lines_ends_in_dots() -> None:
    assert lines("diffusion_online_dpo", 128, num_lines=1) == ["diffusion_online..."]
    assert lines("a red star and a blue heart", 100, num_lines=1) == ["a red star and..."]
    assert lines("abc", 1, num_lines=1) == ["..."]
