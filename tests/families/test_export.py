"""Exported files have the same bytes, whatever the process did before and however often they are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmalign.families.lora import ADAPTERS, ATTENTION
from mmalign.families.step_judge import StepJudge
from mmalign.families.types import Loading, LoraSettings
from mmalign.language.chat import Turn
from mmalign.rewards import step_aware
from tests.helpers import Folders
from tests.helpers.loading import load_diffusion, load_vlm


def files(family: Any, folder: Path) -> dict[str, bytes]:
    """Return the content of every file of an export."""
    folder.mkdir(parents=True)
    family.save(folder, family.network)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_texts_leave_nothing_in_a_pipeline(diffusion_folders: Folders, tmp_path: Path) -> None:
    for name in ("sd15", "sdxl"):
        family: Any = load_diffusion(diffusion_folders(name))
        fresh = files(family, tmp_path / name / "fresh")
        family.encode_prompts(["a fox"])
        used = files(family, tmp_path / name / "used")
        family.count_truncated(["a fox"])
        assert fresh == used == files(family, tmp_path / name / "later")
        tokenizer = json.loads(fresh["tokenizer/tokenizer.json"])
        assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)


def test_texts_leave_nothing_in_a_processor(vlm_folders: Folders, tmp_path: Path) -> None:
    family = load_vlm(vlm_folders("llava"))
    fresh = files(family, tmp_path / "fresh")
    family.processor.processor.tokenizer(["a fox", "a"], padding=True, truncation=True, max_length=7)
    view = family.processor.preprocess_image(Image.new("RGB", (32, 32)))
    family.processor.tokenize_prompt([Turn("user", "<image>\nwhat?")], [("a", view)])
    assert files(family, tmp_path / "used") == fresh


def test_texts_leave_nothing_in_a_step_judge(diffusion_folders: Folders, tmp_path: Path) -> None:
    parts = step_aware.begin(str(diffusion_folders("clip")))
    judge = StepJudge("clip", parts, load_diffusion(diffusion_folders("sd15")), Loading(torch.device("cpu")))
    fresh = files(judge, tmp_path / "fresh")
    judge.tokens(["a fox"])
    assert files(judge, tmp_path / "used") == fresh


def test_adapters_have_the_same_bytes_every_time(diffusion_folders: Folders, tmp_path: Path) -> None:
    """The library writes metadata, and the names of layers, in the order of a hash that changes."""
    family: Any = load_diffusion(diffusion_folders("sd15"))
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=ATTENTION, seed=0))
    written = [files(family, tmp_path / str(number))[ADAPTERS] for number in range(8)]
    assert len(set(written)) == 1
    with safe_open(tmp_path / "0" / ADAPTERS, "pt") as file:
        metadata = file.metadata()
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert list(metadata) and len(shapes) == len(family.network.state_dict()) - len(
        load_diffusion(diffusion_folders("sd15")).network.state_dict()
    )
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.target_modules"] == sorted(ATTENTION) and config["unet.lora_alpha"] == 2  # the rank: folded
