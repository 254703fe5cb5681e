"""Writes in one step."""

import json
from pathlib import Path

import pytest

from mmalign.atomic_io import write_json


def test_json_replaces_a_file_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    write_json(file, {"gain": 1.5, "name": "Zürich"})
    with pytest.raises(TypeError):
        write_json(file, {"gain": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"gain": 1.5, "name": "Zürich"}
    assert list(tmp_path.iterdir()) == [file]


def test_json_with_half_of_a_character_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "numbers.json", {"name": "dog \ud83d"})
    assert json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8")) == {"name": "dog ?"}
