"""Benchmark of a real shape on a GPU in bfloat16: the baseline's step equals ours, and the rate is possible."""

import pytest
import torch

from mmalign.commands.bench import MMALIGN
from tests.benchmarks.against import Request, against

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", ["sd15_lora", "sd15_full"])
def test_stable_diffusion_against_diffusers(case: str) -> None:
    report = against(Request(case, ["train.batch_size=4"], (), "diffusers"), repeats=1)
    assert list(report.runs) == [MMALIGN, "diffusers"]
    ratio = report.ratios[f"diffusers / {MMALIGN}"]
    assert ratio["gradient apart"] is not None
    assert isinstance(ratio["time by operations"], float) and ratio["time by operations"] > 1
    for name, run in report.runs.items():
        share = report.costs[name]["share of peak"]
        assert isinstance(share, float) and 0 < share < 1
        assert run.step_bytes > 0
        assert run.weight_bytes + run.step_bytes < torch.cuda.get_device_properties(0).total_memory
