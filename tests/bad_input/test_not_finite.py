"""Losses and weights that are not finite are named, and never saved."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.commands import train
from mmalign.training import checkpoint, loop
from tests.helpers import first_fast
from tests.helpers.commands import UNET, Commands, Content, contains, weights


def finite(folder: Path) -> bool:
    return all(x.isfinite().all() for x in load_file(folder / "model.safetensors").values())


@pytest.mark.slow
def test_non_finite_loss_names_its_batch_and_keeps_checkpoint(
    mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    """The same command with a lower learning rate goes on."""
    mmalign("train", content, "train.save_every=1")
    message = mmalign.refused("train", content, "train.steps=6", "train.save_every=100", "train.lr=1e30")
    contains(
        message, "train: the loss is not finite after update 3, in batch 4 of epoch 0 (pairs.parquet: row ", ", pairs"
    )
    contains(message, "the same command resumes from checkpoint-00000002: lower train.lr")
    last = checkpoint.latest(tmp_path / "out")
    assert last is not None and last.name == "checkpoint-00000002" and finite(last)
    assert "resuming from checkpoint-00000002" in mmalign("train", content, "train.steps=6", "train.lr=1e-4")


def test_a_loss_of_another_process_has_that_process_s_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those that this one has just read."""
    remote_rows = (2, 3, ["pairs.parquet: row 7"])
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, remote_rows])
    feed: Any = SimpleNamespace(batch_locations=lambda epoch, batch: [f"this one's of {epoch}, {batch}"])
    assert train._failed_batch(loop.BadUpdateError("the loss is not finite", None, 5), feed) == remote_rows
    error = loop.BadUpdateError("the loss is not finite", loop.BatchLocation(1, 4, ()), 5)
    assert train._failed_batch(error, feed) == (1, 4, ["this one's of 1, 3"])


@pytest.mark.slow
@pytest.mark.parametrize("lr", ["1e30", "1e38"])
@pytest.mark.parametrize("tune", first_fast(["full", "lora"]))
def test_what_nobody_could_go_on_from_is_not_saved(
    lr: str, tune: str, mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    """An update can break a model whose last loss was finite: its weights (at 1e38) or its next loss (at 1e30)."""
    out = tmp_path / "out"
    mmalign("train", content, f"model.tune={tune}")
    before = weights(out)
    message = mmalign.refused("train", content, f"model.tune={tune}", "train.steps=3", f"train.lr={lr}")
    contains(message, "train: after update 3 the ", "not finite, so that update was not saved", "lower train.lr")
    assert weights(out) == before
    assert "resuming from checkpoint-00000002" in mmalign("train", content, f"model.tune={tune}", "train.steps=3")
    assert all(finite(path) for path in out.glob("checkpoint-*"))


def test_a_poisoned_model(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "poisoned"
    shutil.copytree(content["model"]["path"], model)
    tensors = load_file(model / UNET)
    tensors["conv_in.weight"] = torch.full_like(tensors["conv_in.weight"], float("nan"))
    save_file(tensors, model / UNET, {"format": "pt"})
    message = mmalign.refused("train", content, f"model.path={model}")
    contains(message, "the loss is not finite after update 0, in batch 1 of epoch 0 (pairs.parquet: row ")
    contains(message, "nothing has been saved yet")
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()
