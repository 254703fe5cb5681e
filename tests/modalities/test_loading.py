"""Loading of models: devices that are slow in a precision."""

from pathlib import Path

import pytest
import torch

from mmalign.commands.load_recipe import load_recipe
from mmalign.modalities.loading import computes_bfloat16, load_model
from tests.helpers import recipes


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", "AVX2", False), ("cpu", "AVX512", True), ("cpu", "SVE256", True), ("cuda", "AVX2", False)],
)
def test_devices_with_bfloat16(device: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulation of a GPU does not count."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert computes_bfloat16(torch.device(device)) is expected


@pytest.mark.parametrize(("precision", "number"), [("bfloat16", 1), ("float32", 0)])
def test_slow_precision_is_reported(
    precision: str, number: int, tiny_sd15: Path, tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    load_model(
        load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, train={"precision": precision})), torch.device("cpu")
    )
    assert sum("this cpu has no instructions for bfloat16" in line for line in log_lines) == number
