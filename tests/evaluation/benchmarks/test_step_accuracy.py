"""Accuracy of a step judge by timestep, through the commands and by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.commands import evaluate as evaluate_module
from mmalign.commands import gallery, prepare, train
from mmalign.commands.load_recipe import load_recipe
from mmalign.evaluation.benchmarks.step_accuracy import StepAccuracy
from tests.helpers import data_files, recipes


def recipe(denoiser: Path, judge: Path, tmp_path: Path, **evaluate: Any) -> Any:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=24)
    content = recipes.diffusion(
        judge,
        pairs,
        tmp_path / "out",
        method={"name": "step_preference", "guidance": 1.0},
        train={"steps": 40, "batch_size": 8, "lr": 2e-3, "save_every": 40},
        data={"validation_fraction": 0.4},
    )
    model = {"path": str(judge), "denoiser": str(denoiser)}
    return load_recipe({**content, "model": model, "evaluate": {"benchmark": "steps", **evaluate}})


@pytest.mark.slow
def test_training_raises_the_step_accuracy(tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """White halves are told apart in little noise by the trained judge; at T - 1 hardly anything is left to see."""
    result = recipe(tiny_sd15, tiny_clip, tmp_path, times=[1, 999])
    train.train(result)
    evaluation = evaluate_module.evaluate(result)
    assert evaluation.result == json.loads((evaluation.folder / "result.json").read_text())
    before, after = (evaluation.result[side]["1"]["estimate"] for side in ("before", "after"))
    assert after > 0.8 and after > before
    assert evaluation.table[0][1:3] == ("before", "after") and [row[0] for row in evaluation.table[1:]] == ["1", "999"]
    with pytest.raises(ValueError, match="a judge generates no images"):
        gallery.gallery(result)
    with pytest.raises(ValueError, match="prepare: a judge generates"):
        prepare.prepare(result)


@pytest.mark.slow
def test_step_accuracy_refuses(tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    result = recipe(tiny_sd15, tiny_clip, tmp_path, times=[1000])
    with pytest.raises(ValueError, match="steps needs a validation split"):
        evaluate_module.evaluate(
            result.model_copy(update={"data": result.data.model_copy(update={"validation_fraction": 0.0})})
        )
    train.train(result.model_copy(update={"train": result.train.model_copy(update={"steps": 1})}))
    with pytest.raises(ValueError, match=r"evaluate\.times: expected timesteps from 0 to 999, got \[1000\]"):
        evaluate_module.evaluate(result)


def test_step_accuracy_by_hand() -> None:
    step_accuracy = StepAccuracy(
        (1, 501),
        ("a", "a", "b", "c"),
        {"before": ((0.5, 0.5, 0.5, 0.5), (1, 0, 0, 1)), "after": ((1, 1, 0, 1), (1, 0, 0.5, 1))},
    )
    assert step_accuracy.accuracy("after", 501).estimate == 0.625
    result = step_accuracy.as_dict()
    assert result["before"]["1"]["estimate"] == 0.5
    assert result["ties"] == {"before": {"1": 1.0, "501": 0.0}, "after": {"1": 0.0, "501": 0.25}}
    assert result["difference"]["1"]["estimate"] == 0.25
    assert step_accuracy.table()[0][:3] == ("timestep (4 pairs)", "before", "after")
