"""A real shape on a GPU: the other program's step computes the same in bfloat16, and the rate is one that can be."""

import pytest
import torch

from mmalign.benchmark.bench import OURS, SAME_IN_HALF, bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", ["sd15_lora", "sd15_full"])
def test_stable_diffusion_against_diffusers(case: str) -> None:
    report = bench(case, peer="diffusers", repeats=1, overrides=["train.batch_size=4"], say=lambda _: None)
    ours, theirs = next(iter(report.models.values()))
    assert (ours.variant, theirs.variant) == (OURS, "diffusers")
    assert theirs.gradient_apart is not None and theirs.gradient_apart < SAME_IN_HALF
    assert theirs.operations > ours.operations
    assert report.peak_rate is not None
    for row in (ours, theirs):
        assert 0 < sum(row.flops.values()) / min(row.whole) < report.peak_rate
        assert row.weight_bytes < row.peak_bytes < torch.cuda.get_device_properties(0).total_memory
