"""Planned memory of models of published sizes, without their weights."""

from pathlib import Path

import pytest

from tests.benchmarks import cards, random_models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd_middle", "sdxl"])
def test_a_folder_of_configurations_has_no_weights(name: str, tmp_path: Path) -> None:
    random_models.write_configurations(name, tmp_path)
    assert (tmp_path / "model_index.json").is_file() and (tmp_path / "unet" / "config.json").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin")]


@pytest.mark.slow
def test_a_row_has_both_peaks_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cards.MODELS, "sd_middle", ("a small model", 128))
    cells = cards.row("sd_middle").split("|")[3:-1]
    kinds, fits = cells[: len(cards.KINDS)], cells[len(cards.KINDS) :]
    assert all(len(cell.split("/")) == 2 for cell in kinds)
    assert [cell.strip() for cell in fits] == ["bfloat16"] * len(cards.CARDS)  # a small model fits every card
