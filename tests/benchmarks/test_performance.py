"""The measurements of docs/performance.md, made once on the smallest model: their numbers hang together."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.benchmark import against, cases, runs, tables
from mmalign.benchmark.bench import OURS
from mmalign.benchmark.measure import Measured
from mmalign.benchmark.tables import Report
from mmalign.commands.load_recipe import load_recipe
from tests.benchmarks import performance
from tests.benchmarks.performance import (
    AGAIN,
    APART,
    COPIED,
    FULL,
    KEPT,
    LAST,
    LOOPED,
    MAPO,
    SEQUENCE,
    STUDIES,
    STUDIES_CUDA,
    TWICE,
    UNCACHED,
    Study,
    Variant,
)
from tests.helpers import data_files, recipes

LORA_VARIANTS, FULL_VARIANTS = (COPIED, UNCACHED, KEPT, SEQUENCE, LAST), (MAPO, LOOPED, AGAIN)


@pytest.fixture(scope="module")
def measured(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    folder = tmp_path_factory.mktemp("benchmark")
    pairs = data_files.pick_a_pic(folder / "pairs.parquet")
    studies = {"lora": (LORA_VARIANTS, (), "diffusers"), "full": (FULL_VARIANTS, (FULL,), None)}
    found = {}
    for tune, (variants, overrides, peer) in studies.items():
        study = Study(
            lambda into: recipes.diffusion(tiny_sd15, pairs, into, model={"tune": "lora"}), variants, overrides, peer
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


@pytest.mark.parametrize("title", [*STUDIES, *STUDIES_CUDA])
def test_every_study_is_one_that_can_be_made(title: str, tmp_path: Path) -> None:
    """Its recipes are recipes, and its peer is there to ask; with no weights written."""
    study = {**STUDIES, **STUDIES_CUDA}[title]
    made: Any = study.content
    content = cases.content(*made.args, tmp_path) if isinstance(made, partial) else made(tmp_path)
    changes = [variant.overrides for variant in study.variants]
    changes += [against.find(study.peer).own] if study.peer else []
    for change in changes:
        assert load_recipe(content, [*study.overrides, *change]).output == str(tmp_path / "output")


def test_spo_with_two_forwards_learns_the_same_from_twice_the_rows(
    tiny_sd15: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    method = {"name": "spo", "steps": 4, "start": 2, "threshold": 0.0, "judge": {"path": str(tiny_clip)}}
    content, found, forwards = recipes.diffusion_in(tiny_sd15, tmp_path, method=method), [], []
    for variant in (Variant(OURS, ""), TWICE):
        run = performance.build(content, [], variant, tmp_path / variant.name, 2)
        found.append(runs.first_gradient(run))
        forwards.append(runs.count_operations(run)[0]["policy"])
        run.learner.accelerator.free_memory()
    apart = found[1].beside(found[0])
    assert apart is not None and apart[0] < 1e-6 and apart[1] < 1e-4
    assert forwards[1] == 2 * forwards[0] > 0


def test_rows_that_share_a_prompt_spare_its_operations(vlm_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A decoder's operations are nearly as the tokens that it reads: attention, a small part of them here, is not."""
    content = recipes.vlm(vlm_folders("llava"), data_files.response_pairs(tmp_path / "rows"), tmp_path / "run")
    forwards = {}
    for variant in (Variant(OURS, ""), APART):
        run = performance.build(content, [], variant, tmp_path / variant.name, 2)
        rows = next(run.feed.batches(0)).tokens.rows
        forwards[variant.name] = runs.count_operations(run)[0]["policy"]
        run.learner.accelerator.free_memory()
    prompts = {(row.ids[: row.start], row.images): row.start for row in rows}
    responses = sum(len(row.response) for row in rows)
    tokens = sum(prompts.values()) + responses, sum(row.start for row in rows) + responses
    assert forwards[APART.name] / forwards[OURS] == pytest.approx(tokens[1] / tokens[0], rel=0.05)
    assert tokens[1] > 1.3 * tokens[0]


def test_what_is_said_to_lie_otherwise_does(tiny_sd15: Path, tmp_path: Path) -> None:
    run = performance.build(recipes.diffusion_in(tiny_sd15, tmp_path), [], LAST, tmp_path / "last", 1)
    kernels = [p for p in run.policy.unwrapped.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    run.learner.accelerator.free_memory()


def test_the_optimizer_that_loops_does(tiny_sd15: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "run")
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
