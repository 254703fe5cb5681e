"""The measurements of docs/performance.md, made once on the smallest model: their numbers hang together."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from torch import nn

from mmalign.benchmark import tables
from mmalign.benchmark.bench import OURS
from mmalign.benchmark.measure import Measured
from mmalign.benchmark.tables import Report
from tests.benchmarks import performance
from tests.benchmarks.performance import (
    AGAIN,
    COPIED,
    FULL,
    KEPT,
    LAST,
    LOOPED,
    MAPO,
    SEQUENCE,
    UNCACHED,
    Study,
    Variant,
)

LORA_VARIANTS, FULL_VARIANTS = (COPIED, UNCACHED, KEPT, SEQUENCE, LAST), (MAPO, LOOPED, AGAIN)


@pytest.fixture(scope="module")
def measured(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    folder = tmp_path_factory.mktemp("benchmark")
    pairs = tiny.pick_a_pic(folder / "pairs.parquet")
    studies = {"lora": (LORA_VARIANTS, (), "diffusers"), "full": (FULL_VARIANTS, (FULL,), None)}
    found = {}
    for tune, (variants, overrides, peer) in studies.items():
        study = Study(
            lambda into: tiny.recipe(tiny_sd15, pairs, into, model={"tune": "lora"}), variants, overrides, peer
        )
        found[tune] = performance.run(tune, study, folder / tune, repeats=1, say=lambda _: None)
    return found.__getitem__


def rows(report: Report) -> dict[str, Measured]:
    (found,) = report.models.values()
    return {row.variant: row for row in found}


def denoiser_bytes(folder: Path) -> int:
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel.from_pretrained(folder / "unet")
    return sum(p.nbytes for p in net.parameters())


def test_every_variant_is_measured(measured: Callable[[str], Report]) -> None:
    assert list(rows(measured("lora"))) == [OURS, *(v.name for v in LORA_VARIANTS), "diffusers"]
    for row in (*rows(measured("lora")).values(), *rows(measured("full")).values()):
        assert len(row.whole) == 1 and row.whole[0] > 0
        assert all(row.parts[part][0] > 0 for part in ("data", "noise", "policy", "backward", "optimizer"))
        assert bool(row.flops["reference"]) == (row.variant not in (MAPO.name, KEPT.name))


def test_operations_follow_from_what_is_computed(measured: Callable[[str], Report]) -> None:
    """Adapters off or a copy: alike. A reference is the policy's forward pass but for adapters; mapo has none."""
    lora, full = rows(measured("lora")), rows(measured("full"))
    ours = lora[OURS].flops
    assert ours == lora[COPIED.name].flops == lora[LAST.name].flops
    assert lora[KEPT.name].flops == {**ours, "reference": 0}
    assert full[MAPO.name].flops == {**full[OURS].flops, "reference": 0}
    assert full[OURS].flops["reference"] == full[OURS].flops["policy"] > 0
    assert 0 < ours["reference"] < ours["policy"]
    assert ours["data"] == 0 < lora[UNCACHED.name].flops["data"] == lora["diffusers"].flops["data"]
    # One half of the forward pass again, but for its last layer.
    assert lora[SEQUENCE.name].repeated * 2 == pytest.approx(ours["policy"], rel=0.02)
    assert lora[OURS].repeated == 0


def test_what_should_compute_the_same_does(measured: Callable[[str], Report]) -> None:
    """A frozen copy is the model without its adapters, and what a cache gives is what was put into it."""
    lora, full = rows(measured("lora")), rows(measured("full"))
    for row in (lora[COPIED.name], lora[UNCACHED.name], full[LOOPED.name], full[AGAIN.name]):
        assert row.loss_apart == row.gradient_apart == 0
    for row in (lora[SEQUENCE.name], lora[LAST.name], lora["diffusers"]):  # sums in another order
        assert row.gradient_apart is not None and row.gradient_apart < 1e-4


def test_memory_is_what_a_variant_holds(measured: Callable[[str], Report], tiny_sd15: Path) -> None:
    network, lora, full = denoiser_bytes(tiny_sd15), rows(measured("lora")), rows(measured("full"))
    for more, less in ((lora[COPIED.name], lora[OURS]), (full[OURS], full[MAPO.name])):
        assert more.state_bytes - less.state_bytes == network
        assert more.peak_bytes - less.peak_bytes == pytest.approx(network, rel=0.01)
    assert lora[SEQUENCE.name].beyond < 0.8 * lora[OURS].beyond


def test_the_optimizer_that_loops_does(tiny_sd15: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    pairs = tiny.pick_a_pic(tmp_path / "pairs.parquet")
    content = tiny.recipe(tiny_sd15, pairs, tmp_path / "run")
    for variant, fused in ((Variant(OURS, ""), True), (LOOPED, False)):
        run = performance.build(content, [], variant, tmp_path / variant.name, 1)
        assert all(group["fused"] is fused for group in run.learner.optimizer.param_groups)
    Accelerator().free_memory()


def test_the_tables_are_whole_and_reach_the_document(
    measured: Callable[[str], Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = performance.joined([measured("lora"), measured("full")])
    saved, document = tmp_path / "performance.json", tmp_path / "performance.md"
    tables.write_report(report, saved)
    document.write_text(f"# Before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        performance.main(["--from", str(saved), "--markdown", str(document)])
        text = document.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{tables.END}\nafter\n") and "old" not in text
    variants = [*LORA_VARIANTS, *FULL_VARIANTS]
    assert all(f"| {variant.name} | " in text and f"| {variant.name} / {OURS} |" in text for variant in variants)
    assert all(text.count(f"- {variant.name} / {OURS}: {variant.why}.") == 1 for variant in variants)
    same = next(line for line in text.splitlines() if line.startswith(f"| {COPIED.name} / {OURS} |"))
    assert same.split(" | ")[1:4] == ["0e+00", "0e+00", "1.00"]
    shown = capsys.readouterr().out
    assert all(variant.name in shown for variant in variants)
    document.write_text("no markers")
    with pytest.raises(ValueError, match="expected a line"):
        tables.write_markdown(report, document)
