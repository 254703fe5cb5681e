"""Inputs of the engine that follows coverage; atheris itself is needed only by the long form."""

import sys

import pytest

from tests.fuzzing.coverage import decoded, fuzz_by_coverage, seeds
from tests.fuzzing.rule import Reader

READER = Reader("two files", lambda folder: None, ({"b": b"2", "a": b"1"},), share=0)


def test_an_input_replaces_one_file() -> None:
    assert [decoded(READER, seed) for seed in seeds(READER)] == [READER.sound[0]] * 2
    assert decoded(READER, b"\x03new") == {"a": b"1", "b": b"new"}
    assert decoded(READER, b"") == READER.sound[0]


def test_missing_atheris_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit, match="pip install atheris"):
        fuzz_by_coverage("trained.json", 1, 0)
