"""A real shape on a GPU in bfloat16: the other program's step is proven ours, and the rate is one that can be."""

import pytest
import torch

from mmalign.benchmark.bench import OURS, bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", ["sd15_lora", "sd15_full"])
def test_stable_diffusion_against_diffusers(case: str) -> None:
    report = bench(case, peer="diffusers", repeats=1, overrides=["train.batch_size=4"], say=lambda _: None)
    ours, theirs = next(iter(report.models.values()))
    assert (ours.variant, theirs.variant) == (OURS, "diffusers")
    assert theirs.gradient_apart is not None
    assert theirs.operations > ours.operations
    assert report.peak_rate is not None
    for row in (ours, theirs):
        assert 0 < sum(row.flops.values()) / min(row.whole) < report.peak_rate
        assert row.weight_bytes < row.peak_bytes < torch.cuda.get_device_properties(0).total_memory
