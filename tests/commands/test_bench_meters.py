"""Meters of `mmalign bench`, by hand."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import library as operators
from torch.utils.checkpoint import checkpoint

from mmalign.commands import _bench_meters as meters
from mmalign.commands._bench_meters import (
    LiveBytes,
    Meter,
    Operations,
    attention_formulas,
    backward,
    forward,
    now,
    peak_rate,
)
from mmalign.families.compile import compile_blocks
from tests.helpers.compiling import traced


def test_meter_loses_no_time() -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    meter = Meter(lambda: next(clock))
    for part in ("policy", "backward", "rest"):
        meter.switch(part)
    assert {part: s for part, s in meter.totals.items() if s} == {"rest": 1.0, "policy": 2.0, "backward": 4.0}


def test_live_bytes_count_what_autograd_keeps() -> None:
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


def test_operations_include_attention_on_a_cpu() -> None:
    """Two products of [16, 8] and [8, 16] numbers in each of two heads, 2 operations a multiplication."""
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with Operations() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 16 * 16 * 8)
    with Operations() as counter:
        torch.autograd.grad(out.sum(), q)
    assert counter.get_total_flops() == 2 * 5 * (2 * 16 * 16 * 8)  # the scores again, and four gradients


@pytest.mark.parametrize("again", [False, True])
def test_operations_of_checkpointing_are_apart(again: bool) -> None:
    """Two layers of 8 by 8 on 4 rows: 512 operations each forward, twice that backward; forward again if asked."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    with Operations() as counter:
        # The second layer's gradient needs its input, so only the first layer is repeated.
        out = checkpoint(layers, x, use_reentrant=False) if again else layers(x)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 512 * 3
    assert counter.repeated == (512 if again else 0)


def test_peak_rate_is_operations_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances by a second with every 3e9 operations, as counted."""
    with Operations() as counter:
        monkeypatch.setattr(meters, "now", lambda _: counter.get_total_flops() / 3e9)
        assert peak_rate(torch.device("cpu"), torch.float32, seconds=0.1) == pytest.approx(3e9)


def test_seconds_of_a_cpu_are_those_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    begun = now(torch.device("cpu"))
    time.sleep(0.2)
    assert now(torch.device("cpu")) - begun < 0.1


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)


def formula(name: str) -> Any:
    return attention_formulas()[getattr(torch.ops.aten, f"_efficient_attention_{name}")]


def test_operations_of_dense_rows_by_hand() -> None:
    """2 rows of 3 queries, 5 keys and 4 heads: 120 logits, of 8 numbers; the values have 6.

    Forward 2 * 120 * (8 + 6); backward 8 three times (logits, gradients of queries and keys) and 6 twice.
    """
    q, k, v = (torch.empty(2, n, 4, width, device="meta") for n, width in ((3, 8), (5, 8), (5, 6)))
    lse = torch.empty(2, 4, 3, device="meta")
    assert forward(q, k, v, None, None) == 2 * 120 * 14
    assert formula("forward")(q, k, v, None, None, None, 3, 5, 0.0, compute_log_sumexp=True) == 2 * 120 * 14
    assert backward(q, k, v, None, None) == 2 * 120 * 36
    assert formula("backward")(v, q, k, v, None, v, None, None, 3, 5, lse) == 2 * 120 * 36


def test_operations_of_rows_side_by_side_by_hand() -> None:
    """Rows of 3 and 4 queries with 5 and 2 keys: 3 * 5 + 4 * 2 = 23 logits a head, and not 7 * 7."""
    q, k = torch.empty(7, 4, 8, device="meta"), torch.empty(7, 4, 8, device="meta")
    of_q, of_k, lse = starts(3, 4), starts(5, 2), torch.empty(4, 7, device="meta")
    assert forward(q, k, k, of_q, of_k) == 2 * 2 * 4 * 23 * 8
    assert backward(q, k, k, of_q, of_k) == 2 * 5 * 4 * 23 * 8
    assert formula("forward")(q[None], k[None], k[None], None, of_q, of_k, 4, 5, 0.0) == 2 * 2 * 4 * 23 * 8
    assert formula("backward")(q[None], q[None], k[None], k[None], None, q[None], of_q, of_k, 4, 5, lse) == 7360


def test_operations_include_those_of_xformers() -> None:
    """A stand-in for xformers' operators has their names and arguments; without them nothing is registered."""
    namespace = torch.ops.xformers_flash
    if hasattr(namespace, "flash_fwd"):
        pytest.skip("xformers is here, which defines it")
    assert not any("xformers" in str(operator) for operator in attention_formulas())
    qkv, cu = "Tensor query, Tensor key, Tensor value", "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
    sizes = "int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, bool is_causal, int left, int right"
    with operators._scoped_library("xformers_flash", "DEF") as library:
        library.define(
            f"flash_fwd({qkv}, {cu}, Tensor? seqused_k, {sizes}, bool return_softmax, Tensor? tables) -> Tensor"
        )
        library.define(f"flash_bwd(bool shared, Tensor grad, {qkv}, Tensor out, Tensor lse, {cu}, {sizes}) -> Tensor")
        library.impl("flash_fwd", lambda query, *_: query.clone(), "CPU")
        library.impl("flash_bwd", lambda shared, grad, *_: grad.clone(), "CPU")
        x = torch.randn(1, 16, 2, 8)
        with Operations() as counter:
            namespace.flash_fwd(x, x, x, None, None, None, 16, 16, 0.0, 1.0, False, -1, -1, False, None)
        assert counter.get_total_flops() == 2 * 2 * (2 * 16 * 16 * 8)  # as of the CPU's attention above
        with Operations() as counter:
            namespace.flash_bwd(False, x, x, x, x, x, x, None, None, 16, 16, 0.0, 1.0, False, -1, -1)
        assert counter.get_total_flops() == 2 * 5 * (2 * 16 * 16 * 8)


@pytest.mark.slow
def test_compiled_layers_are_counted_as_written() -> None:
    """A layer of 8 by 8 on 4 rows, and its weights, its input and the result: the same before and after."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)

    def counted() -> tuple[int, int]:
        with torch.compiler.set_stance("force_eager"), Operations() as counter, LiveBytes() as memory:
            layer(x).square().sum().backward()
        layer.zero_grad()
        return counter.get_total_flops(), memory.peak

    before = counted()
    with traced():
        compile_blocks([layer])
        layer(x).square().sum().backward()
        layer.zero_grad()
        assert before == counted()
    assert before[0] == 2 * 512
