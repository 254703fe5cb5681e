"""Runs of methods that generate their images: from a text file and a function to an adapter, resuming, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.resources import roots
from mmalign.training import checkpoint
from tests.helpers import data_files, recipes
from tests.helpers.commands import Commands
from tests.helpers.runs import assert_resumes

REWARD = """from PIL import ImageStat


def score(images, prompts):
    return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]
"""


@pytest.fixture
def commands(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Return a runner in a folder with prompts and a reward function."""
    (tmp_path / "prompts.txt").write_text("a red fox\na hen\ntwo owls\ngrass\n")
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path, capfd)


def shipped(model: Path, *, function: str = "my_reward:score") -> list[str]:
    """Return the settings of docs/online.md for the shipped recipe, and those that make its model and run tiny."""
    return [
        "data.path=prompts.txt",
        f"method.reward={{name: function, path: '{function}'}}",
        f"model.path={model}",
        "model.vae=null",
        "model.vae_dtype=float32",
        "data.resolution=16",
        "method.generation.images=3",
        "method.generation.steps=2",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.steps=5",
        "train.log_every=1",
        "output=out",
    ]


@pytest.mark.slow
def test_a_text_file_and_a_function_make_an_adapter(commands: Commands, tiny_sdxl: Path) -> None:
    """The shipped recipe of SDXL: four updates of one generation and one of the next, and a verdict on the rewards."""
    path = roots()[1] / "configs" / "text_to_image" / "diffusion_online_dpo_sdxl_lora.yaml"
    out = commands("train", load_recipe(path).model_dump(), *shipped(tiny_sdxl))
    assert "in the first of 2 generations" in out and "s of the updates" in out
    weights = load_file("out/model/pytorch_lora_weights.safetensors")
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name or "lora.up" in name)
    last = checkpoint.latest(Path("out"))
    assert last is not None
    history = torch.load(last / "state.pt", weights_only=False)["reports"]["history"]
    assert all(0 < update["reward"] < 1 for update in history) and len({update["reward"] for update in history}) == 2


@pytest.mark.slow
def test_a_run_of_one_update_has_a_verdict(commands: Commands, tiny_sdxl: Path) -> None:
    content = load_recipe("text_to_image/diffusion_online_dpo_sdxl_lora").model_dump()
    out = commands("train", content, *shipped(tiny_sdxl), "train.steps=1")
    assert "and one generation shows no change" in out


@pytest.mark.slow
def test_a_judge_of_one_number_stops_the_run(commands: Commands, tiny_sdxl: Path) -> None:
    Path("my_constant.py").write_text("def score(images, prompts):\n    return [0.5] * len(images)\n")
    content = load_recipe("text_to_image/diffusion_online_dpo_sdxl_lora").model_dump()
    message = commands.refused("train", content, *shipped(tiny_sdxl, function="my_constant:score"))
    assert "epoch 0 has nothing to learn from" in message and "the same score; look at the reward model" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lagging"),
    [
        ("nft", {}),
        ("nft", {"old": {"every": 2, "mix": 0.5, "ramp": 0.1}, "reference": {"every": 1, "mix": 0.5}}),
        ("diffusion_online_dpo", {}),
    ],
)
def test_a_run_resumes_between_generations(
    name: str, lagging: dict[str, Any], tiny_sd15: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Bit for bit: two noisings of two parts each, two parts an update, so a batch is two updates.

    The verdict is that of an uninterrupted run too: it counts two generations.
    """
    generation = {"images": 3, "steps": 2, "noisings": 2, "prompts_per_contrast": 1}
    method: dict[str, Any] = {"name": name, "reward": {"path": str(tiny_clip)}, "generation": generation, **lagging}
    options = {"steps": 4, "save_every": 1, "gradient_accumulation_steps": 2, "keep_checkpoints": 5}
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "whole", method=method, train=options)
    assert_resumes(content)
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == [
        "checkpoint-00000002",
        "checkpoint-00000004",
    ]
    verdicts = [train(load_recipe({**content, "output": str(tmp_path / run)})).verdict for run in ("whole", "stopped")]
    assert verdicts[0] == verdicts[1] and "in the first of 2 generations" in verdicts[0]
