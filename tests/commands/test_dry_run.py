"""Dry run of a training: the checks and first lines of a real one, and not a file."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands.load_recipe import load_recipe
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
