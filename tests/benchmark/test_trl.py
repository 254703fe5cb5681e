"""The loss of TRL's own trainer against ours, where TRL is installed; and what is said where it is not."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from typer.testing import CliRunner

from mmalign.benchmark import bench, cases
from mmalign.benchmark.against import trl
from mmalign.benchmark.bench import OURS, Asked
from mmalign.cli import app
from mmalign.commands.load_recipe import load_recipe

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


def recipe(model: Path, folder: Path, tune: str = "lora", **method: Any) -> dict[str, Any]:
    cases.draw_response_pairs(folder / "pairs.jsonl", side=32, prompt=20, responses=(10, 14), number=8)
    return {
        "method": {"name": "dpo", **method},
        "model": {"path": str(model), "tune": tune},
        "data": {"format": "trl", "path": str(folder / "pairs.jsonl")},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-4},
        "output": str(folder / "output"),
    }


@needs_trl
@pytest.mark.parametrize(("name", "tune"), [("llava", "lora"), ("llava", "full"), ("qwen2_5_vl", "lora")])
def test_trl_computes_the_same(name: str, tune: str, vlm_folders: Any, tmp_path: Path) -> None:
    """Two rows a pair against one image's features: float32 rounds otherwise, by some 1e-6."""
    asked = Asked(recipe(vlm_folders(name), tmp_path, tune), peer="trl")
    report = bench.run(asked, tmp_path, Accelerator(), name=name, repeats=1, say=lambda _: None)
    ours, theirs = next(iter(report.models.values()))
    assert (ours.variant, theirs.variant) == (OURS, "trl")
    assert theirs.loss_apart is not None and theirs.loss_apart < 1e-5
    assert theirs.gradient_apart is not None and theirs.gradient_apart < 1e-4
    assert theirs.operations > ours.operations


def test_without_trl_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: no model is written first."""
    monkeypatch.setitem(sys.modules, "trl", None)
    done = CliRunner().invoke(app, ["bench", "llava_middle", "--against", "trl"])
    assert done.exit_code == 1 and "pip install 'trl>=1.16'" in " ".join(done.output.split())


def test_what_trl_does_otherwise_is_refused(vlm_folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 2 processes; use one"):
        trl.check(load_recipe(recipe(vlm_folders("llava"), tmp_path)), 2)
    with pytest.raises(ValueError, match="nll: 0"):
        trl.check(load_recipe(recipe(vlm_folders("llava"), tmp_path, nll=1.0)), 1)
    with pytest.raises(ValueError, match="idefics3"):
        trl.check(load_recipe(recipe(vlm_folders("idefics3"), tmp_path)), 1)
