"""TRL's own trainer: its loss equals ours where TRL is installed, and a missing TRL is an error."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mmalign.commands.bench import MMALIGN
from mmalign.commands.load_recipe import load_recipe
from tests.benchmarks import against, cases
from tests.benchmarks.against import Request
from tests.benchmarks.peers import trl
from tests.helpers import recipes

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


def content(model: Path, folder: Path, tune: str = "lora", **method: Any) -> dict[str, Any]:
    cases.write_response_pairs(folder / "pairs.jsonl", side=32, prompt=20, responses=(10, 14), number=8)
    sections = {"method": {"name": "dpo", **method}, "model": {"tune": tune}}
    return recipes.vlm(model, folder / "pairs.jsonl", folder / "output", **sections)


@needs_trl
@pytest.mark.parametrize(("name", "tune"), [("llava", "lora"), ("llava", "full"), ("qwen2_5_vl", "lora")])
def test_trl_computes_the_same(name: str, tune: str, vlm_folders: Any, tmp_path: Path) -> None:
    """Two rows per pair against one image's features: float32 rounds differently, by some 1e-6."""
    request = Request(content(vlm_folders(name), tmp_path, tune), peer="trl")
    report = against.against(request, repeats=1)
    ratio = report.ratios[f"trl / {MMALIGN}"]
    assert isinstance(ratio["loss apart"], float) and ratio["loss apart"] < 1e-5
    assert isinstance(ratio["gradient apart"], float) and ratio["gradient apart"] < 1e-4
    assert isinstance(ratio["time by operations"], float) and ratio["time by operations"] > 1


def test_missing_trl_is_reported_before_a_model_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(cases, "write_case", lambda *_: pytest.fail("a model was written"))
    with pytest.raises(ValueError, match=r"pip install 'trl>=1\.16'"):
        against.main(["llava_middle", "trl"])


def test_trl_refuses_what_it_does_differently(vlm_folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 processes"):
        trl.check(load_recipe(content(vlm_folders("llava"), tmp_path)), 2)
    with pytest.raises(ValueError, match="nll"):
        trl.check(load_recipe(content(vlm_folders("llava"), tmp_path, nll=1.0)), 1)
    with pytest.raises(ValueError, match="idefics3"):
        trl.check(load_recipe(content(vlm_folders("idefics3"), tmp_path)), 1)
