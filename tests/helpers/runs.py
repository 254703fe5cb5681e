"""Short trainings on tiny models."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import Trained, train
from mmalign.training import checkpoint
from tests.helpers import data_files, recipes

BOUND = 1e-5  # in another batch a score is rounded otherwise by about 1e-6 in float32
EPOCH = 4  # batches of two: eight pairs


def trained(content: dict[str, Any], *overrides: str) -> tuple[Trained, dict[str, Tensor]]:
    """Train, and return the result with the weights of the last checkpoint."""
    result = load_recipe(content, overrides)
    done, last = train(result), checkpoint.latest(Path(result.output))
    assert last is not None and last.name == f"checkpoint-{result.train.steps:08d}"
    return done, load_file(last / "model.safetensors")


def train_weights(content: dict[str, Any], *overrides: str) -> dict[str, Tensor]:
    return trained(content, *overrides)[1]


def assert_resumes(content: dict[str, Any]) -> dict[str, Tensor]:
    """Check that a run resumed after its first checkpoint equals an uninterrupted run bit by bit.

    Returns:
        The weights of the last checkpoint.
    """
    weights, whole = train_weights(content), Path(content["output"])
    stopped = whole.with_name("stopped")
    shutil.copytree(whole, stopped)
    for late in sorted(stopped.glob("checkpoint-*"))[1:]:
        shutil.rmtree(late)
    assert_same(weights, train_weights({**content, "output": str(stopped)}))
    exports = list((whole / "model").rglob("*.safetensors"))
    for path in exports:
        assert_same(load_file(path), load_file(stopped / path.relative_to(whole)))
    assert exports
    return weights


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]


def assert_close(run: Trained, other_run: Trained) -> None:
    """Check that the losses of all updates agree to rounding: by BOUND of a loss below 1, and of its size above."""
    expected = pytest.approx([update["loss"] for update in other_run.history], abs=BOUND, rel=BOUND)
    assert [update["loss"] for update in run.history] == expected


def numbers(done: Trained) -> list[dict[str, float]]:
    """Return all reported numbers of the updates."""
    return done.history


def responses(model: Path, tmp_path: Path, output: str, /, **sections: Any) -> dict[str, Any]:
    rows = tmp_path / "rows" / "realign.jsonl"
    source = rows if rows.exists() else data_files.response_pairs(tmp_path / "rows", layout="realign")
    given = {"data": {"format": "realign"}, **sections}
    return recipes.vlm(model, source, tmp_path / output, **given)


def pictures(model: Path, tmp_path: Path, output: str, /, **sections: Any) -> dict[str, Any]:
    source = tmp_path / "pairs.parquet"
    return recipes.diffusion(
        model, source if source.exists() else data_files.pick_a_pic(source), tmp_path / output, **sections
    )
