"""Another program's step in half precision: proven in float32, since bfloat16 would refuse what is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mmalign.benchmark import bench, runs
from mmalign.benchmark.against import diffusers
from mmalign.benchmark.bench import OURS, SAME, Asked
from mmalign.benchmark.proof import apart_in_float32
from mmalign.config import Recipe
from tests.benchmark.wrong_steps import wrong_beta_of
from tests.helpers import data_files, recipes


@pytest.fixture
def asked(tiny_sd15: Path, tmp_path: Path) -> Asked:
    """The released beta, in bfloat16 with adapters."""
    sections: dict[str, Any] = {
        "method": {"name": "diffusion_dpo", "beta": 5000.0},
        "model": {"tune": "lora"},
        "train": {"precision": "bfloat16"},
    }
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    return Asked(recipes.diffusion(tiny_sd15, pairs, tmp_path / "output", **sections), peer="diffusers")


def test_what_is_right_is_measured_in_half_precision(asked: Asked, tmp_path: Path) -> None:
    said: list[str] = []
    report = bench.run(asked, tmp_path, Accelerator(), name="half", repeats=1, say=said.append)
    (rows,) = report.models.values()
    assert [row.variant for row in rows] == [OURS, "diffusers"]
    assert said[0] == "diffusers: compared in float32"


def test_what_is_wrong_is_refused_in_half_precision(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "loss", wrong_beta_of(diffusers.loss))
    with pytest.raises(ValueError, match="diffusers does not compute what it is compared with"):
        bench.run(asked, tmp_path, Accelerator(), name="wrong", repeats=1, say=lambda _: None)


@pytest.mark.parametrize("of_accelerator", ["no", "bf16"])
def test_it_is_float32_whatever_is_measured(
    of_accelerator: str, start: Any, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times nearer than what is asked; with fewer pairs, and not several batches. No autocast is left on.

    Where precision is float16, the accelerator puts it around the network; on a CPU it does so for bfloat16 alone.
    """
    recipe, built, build = asked.recipe("train.accumulate=2", "train.batch_size=4"), list[Recipe](), runs.build
    autocast = list[bool]()

    def noted(recipe: Recipe, *args: Any, **kwargs: Any) -> runs.Run:
        built.append(recipe)
        run = build(recipe, *args, **kwargs)
        inside: Any = run.policy.unwrapped
        inside.conv_in.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
        return run

    monkeypatch.setattr(runs, "build", noted)
    accelerator = Accelerator(mixed_precision=of_accelerator)
    apart = apart_in_float32(recipe, asked.recipe(*diffusers.own), diffusers, tmp_path, accelerator)
    assert apart is not None and apart[1] < SAME / 10
    found = [(r.train.precision, r.model.vae_dtype, r.train.accumulate, r.train.batch_size) for r in built]  # type: ignore[union-attr]
    assert autocast and not any(autocast)
    assert found == [("float32", "float32", 1, 2)] * 2 and recipe.train.precision == "bfloat16"
