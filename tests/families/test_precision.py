"""Devices that are slow in a precision, and the warnings of it for each key that names one."""

from pathlib import Path

import pytest
import torch

from mmalign.commands.load_recipe import load_recipe
from mmalign.config import RewardConfig
from mmalign.families.precision import computes_bfloat16
from mmalign.modalities.loading import build_reward_model, load_model
from tests.helpers import Folders, recipes


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", "AVX2", False), ("cpu", "AVX512", True), ("cpu", "SVE256", True), ("cuda", "AVX2", False)],
)
def test_devices_with_bfloat16(device: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulation of a GPU does not count."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert computes_bfloat16(torch.device(device)) is expected


def slow_keys(log_lines: list[str]) -> list[str]:
    """Return the keys that were warned of."""
    sentence = ": this cpu has no instructions for bfloat16"
    return [line.split("warning: ")[1].split(sentence)[0] for line in log_lines if sentence in line]


@pytest.mark.parametrize("keys", [[], ["train.precision"], ["model.vae_dtype"]])
def test_slow_precision_of_a_model_is_reported(
    keys: list[str], tiny_sd15: Path, tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    settings = [f"{key}=bfloat16" for key in keys]
    load_model(load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path), settings), torch.device("cpu"))
    assert slow_keys(log_lines) == keys


@pytest.mark.parametrize(("precision", "keys"), [("float32", []), ("bfloat16", ["reward vlm: precision"])])
def test_slow_precision_of_a_judge_is_reported(
    precision: str, keys: list[str], vlm_folders: Folders, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    config = RewardConfig(name="vlm", path=str(vlm_folders("llava")), options={"precision": precision})
    build_reward_model(config, torch.device("cpu"), allow_pickle=False)
    assert slow_keys(log_lines) == keys
