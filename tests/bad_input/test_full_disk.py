"""A full disk: one sentence of error, and earlier files unchanged."""

from pathlib import Path

import pytest

from tests.helpers import data_files
from tests.helpers.commands import Commands, Content, contains, weights
from tests.helpers.disk import full_disk


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content, f"output={tmp_path / 'whole'}", "train.steps=4")
    out = tmp_path / "out"
    mmalign("train", content)
    before = weights(out)
    with full_disk(100_000):
        message = mmalign.refused("train", content, "train.steps=4")
    contains(message, f"{out / 'checkpoint-00000004'}: could not be written (", "earlier files are unchanged")
    assert weights(out) == before and not list(out.glob("*.part"))
    assert "resuming from checkpoint-00000002" in mmalign("train", content, "train.steps=4")
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


@pytest.mark.slow
def test_a_full_disk_at_the_export_keeps_the_model_before(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    model = tmp_path / "out" / "model"
    before = weights(model)
    with full_disk(100_000):  # all updates are done: what fails is the export
        message = mmalign.refused("train", content)
    contains(message, f"{model}: could not be written (", "earlier files are unchanged")
    assert weights(model) == before and not list(model.parent.glob(".model.*"))


@pytest.mark.slow
def test_a_full_disk_at_the_cache_keeps_what_was_encoded(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content, "data.limit=2", "data.cache='off'", f"output={tmp_path / 'first'}")  # maps the table
    with full_disk(10_000):
        message = mmalign.refused("train", content)
    contains(
        message,
        f"{tmp_path / 'out' / 'cache'}/",
        ": could not be written (",
        "free some space and run the same command again",
    )
    assert not list((tmp_path / "out" / "cache").rglob("*.part"))
    mmalign("train", content)


def test_a_full_disk_where_tables_are_mapped(mmalign: Commands, content: Content, pairs: Path) -> None:
    data_files.pick_a_pic(pairs, number=11)  # a table that no test has mapped
    with full_disk(5_000):
        message = mmalign.refused("train", content, f"data.path={pairs}")
    contains(message, f"data.path: {pairs} could not be copied to ", "set HF_DATASETS_CACHE to another folder")


@pytest.mark.slow
def test_full_disk_keeps_earlier_evaluation_and_gallery(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mmalign("train", content)
    mmalign("evaluate", content)
    page = Path(mmalign("gallery", content).removeprefix("gallery: ").strip())
    samples, shown = (out / "evaluation" / "samples.json").read_bytes(), page.read_bytes()
    with full_disk(4_000):
        message = mmalign.refused("evaluate", content)
        contains(message, f"{out / 'evaluation'}: could not be written (", "earlier files are unchanged")
        message = mmalign.refused("gallery", content, "gallery.title=Another")
        contains(message, f"{out / 'gallery'}/", ": could not be written (", "free some space")
    assert (out / "evaluation" / "samples.json").read_bytes() == samples and page.read_bytes() == shown
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
