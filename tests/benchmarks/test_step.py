"""The benchmark of a training step, run once on the smallest model: its numbers hang together."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tests.benchmarks.meters import LiveBytes, Meter, flop_counter
from tests.benchmarks.tables import COMPARISONS, FULL, LORA, LORA_COPY, LORA_UNCACHED, MAPO, VARIANTS, Measured, Report
from torch import nn

from tests.benchmarks import step, tables


@pytest.fixture(scope="module")
def rows(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("benchmark")
    smallest = step.Model("smallest", str(tiny_sd15), 16, 2)
    return {row.variant: row for row in step.measure(smallest, folder, repeats=1, say=lambda _: None)}


def denoiser_bytes(folder: Path) -> int:
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel.from_pretrained(folder / "unet")
    return sum(p.nbytes for p in net.parameters())


def test_every_variant_is_measured(rows: dict[str, Measured]) -> None:
    assert list(rows) == [v.name for v in VARIANTS]
    for row in rows.values():
        assert len(row.whole) == 1 and row.whole[0] > 0
        assert all(row.parts[part][0] > 0 for part in ("data", "noise", "policy", "backward", "optimizer"))
        assert (row.parts["reference"][0] > 1e-4) == (row.variant != MAPO.name)  # a call that returns at once


def test_the_parts_add_up_to_the_whole(tiny_sd15: Path, tmp_path: Path) -> None:
    """Seconds seen from outside are those of the parts; what no part explains is the loop's own, and small."""
    pairs = tmp_path / "pairs.parquet"
    step.draw_pairs(pairs, 16)
    smallest = step.Model("smallest", str(tiny_sd15), 16, 2)
    run = step.build(FULL, smallest, pairs, tmp_path / "cache", Accelerator())
    step.advance(run, 1)
    started = time.perf_counter()
    meter = Meter(time.perf_counter)
    step.advance(run, 3, meter)
    meter.switch("rest")
    whole = time.perf_counter() - started
    assert sum(meter.total.values()) == pytest.approx(whole, rel=0.02)
    assert meter.total["rest"] < 0.25 * whole


def test_a_meter_loses_no_time() -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    meter = Meter(lambda: next(clock))
    for part in ("policy", "backward", "rest"):
        meter.switch(part)
    assert {part: s for part, s in meter.total.items() if s} == {"rest": 1.0, "policy": 2.0, "backward": 4.0}


def test_operations_follow_from_what_is_computed(rows: dict[str, Measured]) -> None:
    """Adapters off or a copy: alike. A reference is the policy's forward pass but for adapters; mapo has none."""
    assert rows[LORA.name].flops == rows[LORA_COPY.name].flops
    full = rows[FULL.name].flops
    assert full["reference"] == full["policy"] > 0
    assert rows[MAPO.name].flops == {**full, "reference": 0}
    assert 0 < rows[LORA.name].flops["reference"] < rows[LORA.name].flops["policy"]
    assert rows[LORA.name].flops["data"] == 0 < rows[LORA_UNCACHED.name].flops["data"]


def test_a_copy_costs_a_network_in_memory(rows: dict[str, Measured], tiny_sd15: Path) -> None:
    network = denoiser_bytes(tiny_sd15)
    for more, less in ((LORA_COPY, LORA), (FULL, MAPO)):
        assert rows[more.name].state_bytes - rows[less.name].state_bytes == network
        assert rows[more.name].peak_bytes - rows[less.name].peak_bytes == pytest.approx(network, rel=0.01)
    assert all(row.peak_bytes > row.state_bytes * 0.75 for row in rows.values())


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
    with flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 16 * 16 * 8)
    with flop_counter() as counter:
        torch.autograd.grad(out.sum(), q)
    assert counter.get_total_flops() == 2 * 5 * (2 * 16 * 16 * 8)  # the scores again, and four gradients


def test_the_tables_are_whole_and_reach_the_document(
    rows: dict[str, Measured], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(step.machine(), {"smallest": list(rows.values())})
    saved, document = tmp_path / "step.json", tmp_path / "performance.md"
    saved.write_text(json.dumps(asdict(report)))
    document.write_text(f"# Before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        step.main(["--from", str(saved), "--markdown", str(document)])
        text = document.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{tables.END}\nafter\n") and "old" not in text
    assert all(f"| {variant.name} | " in text for variant in VARIANTS)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 * 2 + len(VARIANTS) + len(
        COMPARISONS
    )
    same = next(line for line in text.splitlines() if line.startswith(f"| {LORA_COPY.name} / {LORA.name} |"))
    assert same.split(" | ")[1] == "1.00"
    shown = capsys.readouterr().out
    assert all(variant.name in shown for variant in VARIANTS)
    document.write_text("no markers")
    with pytest.raises(ValueError, match="expected a line"):
        tables.write_markdown(report, document)
