"""Meters by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmalign.benchmark.meters import LiveBytes, Meter, Operations, peak_rate


def test_a_meter_loses_no_time() -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    meter = Meter(lambda: next(clock))
    for part in ("policy", "backward", "rest"):
        meter.switch(part)
    assert {part: s for part, s in meter.total.items() if s} == {"rest": 1.0, "policy": 2.0, "backward": 4.0}


def test_live_bytes_counts_what_autograd_keeps() -> None:
    """b = 2a, c = b * b keeps b; after `del` b still lives in the graph, c does not."""
    a = torch.ones(1000, requires_grad=True)
    with LiveBytes() as memory:
        b = 2 * a  # 4,000 bytes each for a and b
        assert memory.live == 8000
        c = b * b
        total = c.sum()  # and 4 for a scalar
        del b, c
        assert (memory.live, memory.peak) == (8004, 12004)
        del total
        assert memory.live == 4000


def test_the_counter_knows_attention() -> None:
    """Two products of [16, 8] and [8, 16] numbers in each of two heads, 2 operations a multiplication."""
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with Operations() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 16 * 16 * 8)
    with Operations() as counter:
        torch.autograd.grad(out.sum(), q)
    assert counter.get_total_flops() == 2 * 5 * (2 * 16 * 16 * 8)  # the scores again, and four gradients


@pytest.mark.parametrize("again", [False, True])
def test_what_checkpointing_repeats_is_counted_apart(again: bool) -> None:
    """Two layers of 8 by 8 on 4 rows: 512 operations each forward, twice that backward; forward once more if asked."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    with Operations() as counter:
        # The second layer's gradient needs its input, so the repetition goes on until that is there: one layer.
        out = checkpoint(layers, x, use_reentrant=False) if again else layers(x)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 512 * 3
    assert counter.repeated == (512 if again else 0)


def test_no_product_is_faster_than_the_probe_says() -> None:
    """A smaller product of the same kind reaches less, or little more where the clock is coarse."""
    rate = peak_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert rate > 1e8
