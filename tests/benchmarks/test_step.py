"""The benchmark of docs/performance.md, run once on the smallest model: its numbers hang together."""

from pathlib import Path

import pytest
import tiny
from torch import nn

from mmalign.benchmark import tables
from mmalign.benchmark.measure import Measured
from mmalign.benchmark.meters import machine
from mmalign.benchmark.tables import Report
from tests.benchmarks import step
from tests.benchmarks.step import COMPARISONS, FULL, LORA, LORA_COPY, LORA_UNCACHED, MAPO, VARIANTS


@pytest.fixture(scope="module")
def rows(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("benchmark")
    smallest = tiny.recipe(
        tiny_sd15, tiny.pick_a_pic(folder / "pairs.parquet"), folder / "output", model={"tune": "lora"}
    )
    found = step.measure_variants(smallest, folder, repeats=1, say=lambda _: None)
    return {row.variant: row for row in found}


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


def test_operations_follow_from_what_is_computed(rows: dict[str, Measured]) -> None:
    """Adapters off or a copy: alike. A reference is the policy's forward pass but for adapters; mapo has none."""
    assert rows[LORA.name].flops == rows[LORA_COPY.name].flops
    full = rows[FULL.name].flops
    assert full["reference"] == full["policy"] > 0
    assert rows[MAPO.name].flops == {**full, "reference": 0}
    assert 0 < rows[LORA.name].flops["reference"] < rows[LORA.name].flops["policy"]
    assert rows[LORA.name].flops["data"] == 0 < rows[LORA_UNCACHED.name].flops["data"]


def test_what_should_compute_the_same_does(rows: dict[str, Measured]) -> None:
    """A frozen copy is the model without its adapters, and what a cache gives is what was put into it."""
    for name in (LORA_COPY.name, LORA_UNCACHED.name):
        assert rows[name].loss_apart == rows[name].gradient_apart == 0
    assert rows[FULL.name].gradient_apart is None  # other weights


def test_a_copy_costs_a_network_in_memory(rows: dict[str, Measured], tiny_sd15: Path) -> None:
    network = denoiser_bytes(tiny_sd15)
    for more, less in ((LORA_COPY, LORA), (FULL, MAPO)):
        assert rows[more.name].state_bytes - rows[less.name].state_bytes == network
        assert rows[more.name].peak_bytes - rows[less.name].peak_bytes == pytest.approx(network, rel=0.01)
    assert all(row.peak_bytes > row.state_bytes * 0.75 for row in rows.values())


def test_the_tables_are_whole_and_reach_the_document(
    rows: dict[str, Measured], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(machine(), {"smallest": list(rows.values())}, COMPARISONS, 1e9)
    saved, document = tmp_path / "step.json", tmp_path / "performance.md"
    tables.write_report(report, saved)
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
    assert same.split(" | ")[1:4] == ["0e+00", "0e+00", "1.00"]
    shown = capsys.readouterr().out
    assert all(variant.name in shown for variant in VARIANTS)
    document.write_text("no markers")
    with pytest.raises(ValueError, match="expected a line"):
        tables.write_markdown(report, document)
