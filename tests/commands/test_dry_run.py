"""Dry run of a training: the checks and first lines of a real one, and not a file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.preflight import _warn_of_bfloat16, check_precision
from mmalign.config import Train
from mmalign.training import loop
from tests.helpers import Folders, data_files, recipes


@pytest.fixture
def content(vlm_folders: Folders, tmp_path: Path) -> dict[str, Any]:
    return recipes.vlm(vlm_folders("llava"), data_files.response_pairs(tmp_path / "rows"), tmp_path / "new" / "run")


@pytest.fixture
def no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run trains nothing")

    monkeypatch.setattr(loop, "train", refuse)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.usefixtures("no_update", "no_model")
def test_a_new_run_loads_no_weights_and_writes_nothing(
    content: dict[str, Any], tmp_path: Path, log_lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    assert mmalign.train(load_recipe(content), dry_run=True) is None
    assert files(tmp_path) == before
    assert any("would begin" in line for line in log_lines)
    plan = capsys.readouterr().out
    assert "8 pairs; update: 1 process x 2 pairs" in plan and "optimizer" in plan and "disk: checkpoints" in plan


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("output={file}/run", "output: {file}/run is not writable"),
        ("data.path={file}.jsonl", "data.path: {file}.jsonl"),
        ("model.lora.targets=[nothing]", "nothing"),
        ("train.trackers=[nothing]", "train.trackers: nothing"),
    ],
)
def test_a_mistake_ends_with_exit_code_1(setting: str, part: str, content: dict[str, Any], tmp_path: Path) -> None:
    file, recipe = tmp_path / "file", tmp_path / "recipe.yaml"
    file.touch()
    recipe.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(cli.app, ["train", str(recipe), setting.format(file=file), "--dry-run"])
    assert result.exit_code == 1 and part.format(file=file) in result.stderr, result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_with_a_checkpoint_says_whether_it_resumes(content: dict[str, Any], log_lines: list[str]) -> None:
    mmalign.train(load_recipe(content, ["train.steps=2"]))
    output = Path(content["output"])
    before = files(output)
    mmalign.train(load_recipe(content), dry_run=True)
    assert log_lines[-1].endswith(f"would resume from checkpoint-00000002 in {output}")
    with pytest.raises(ValueError, match=r"seed"):
        mmalign.train(load_recipe(content, ["train.seed=1"]), dry_run=True)
    assert files(output) == before


@pytest.mark.parametrize(
    ("capability", "on_card", "word"),
    [("AVX2", False, "CPU"), ("AVX512", False, None), ("AVX2", True, "GPU"), ("SVE256", False, None)],
)
def test_slow_precision_is_reported(
    capability: str, on_card: bool, word: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A processor without instructions for bfloat16 computes it number by number."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    _warn_of_bfloat16.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_precision(Train(steps=1, lr=1e-5, precision="bfloat16"))
        check_precision(Train(steps=1, lr=1e-5, precision="float32"))
    expected = f"this {word} has no instructions for bfloat16"
    assert [expected in message for message in caplog.messages] == ([True] if word else [])
