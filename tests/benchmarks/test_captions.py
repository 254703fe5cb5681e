"""The benchmark of captions writes every kind of page, and fails where long captions take too long."""

import sys
from collections.abc import Callable

import pytest

from tests.benchmarks import captions


def test_a_kind_that_grows_with_its_captions_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captions", "--repeats", "1"])
    monkeypatch.setattr(captions, "KINDS", {"slow": lambda text: [text[:n] for n in range(len(text))]})
    assert captions.main() == 1
    assert "| slow | one word |" in capsys.readouterr().out


@pytest.mark.parametrize("write", captions.KINDS.values(), ids=captions.KINDS)
def test_every_kind_of_page_is_written(write: Callable[[str], None]) -> None:
    write("a red circle")
