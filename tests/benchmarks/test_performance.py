"""Measurements of docs/performance.md, made once on the smallest model: their numbers are consistent."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import nn

from mmalign.atomic_io import write_json
from mmalign.commands._bench_run import Run, count_operations
from mmalign.commands._bench_run import build as build_run
from mmalign.commands.bench import MMALIGN, Report
from mmalign.commands.load_recipe import load_recipe
from tests.benchmarks import cases, performance
from tests.benchmarks.equality import first_gradient
from tests.benchmarks.performance import (
    BEGIN,
    CACHED,
    CHECKPOINTED,
    COPIED,
    END,
    FULL,
    LAST,
    LOOPED,
    MAPO,
    SEQUENCE,
    STUDIES,
    STUDIES_CUDA,
    TWICE,
    UNCACHED,
    UNPACKED,
    Study,
    Variant,
)
from tests.helpers import data_files, recipes

pytestmark = pytest.mark.xdist_group("performance")  # its fixture runs once

PLAIN = Variant(MMALIGN, "")
LORA_VARIANTS, FULL_VARIANTS = (COPIED, UNCACHED, CACHED, SEQUENCE, LAST), (MAPO, LOOPED, CHECKPOINTED)


@pytest.fixture(scope="module")
def measured(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    folder = tmp_path_factory.mktemp("benchmark")
    content = recipes.diffusion_in(tiny_sd15, folder, model={"tune": "lora"})
    studies = {
        "lora": Study(lambda _: content, LORA_VARIANTS, (), "diffusers"),
        "full": Study(lambda _: content, FULL_VARIANTS, (FULL,)),
    }
    reports = {tune: performance.run(tune, study, folder / tune, repeats=1) for tune, study in studies.items()}
    return reports.__getitem__


def build(content: Any, variant: Variant, folder: Path, updates: int) -> Run:
    recipe = load_recipe(content, variant.overrides)
    return variant.change(build_run(recipe, Accelerator(), folder, updates))


def test_every_variant_is_measured(measured: Callable[[str], Report]) -> None:
    lora, full = measured("lora").runs, measured("full").runs
    assert list(lora) == [MMALIGN, *(v.name for v in LORA_VARIANTS), "diffusers"]
    for name, run in (*lora.items(), *full.items()):
        assert len(run.seconds) == 1 and run.seconds[0] > 0
        assert all(run.parts[part][0] > 0 for part in ("data", "noise", "policy", "backward", "optimizer"))
        assert bool(run.operations["reference"]) == (name not in (MAPO.name, CACHED.name))


def test_operations_follow_from_the_variant(measured: Callable[[str], Report]) -> None:
    """Adapters off and a copy cost the same. The reference is a forward pass without adapters; mapo has none."""
    lora, full = measured("lora").runs, measured("full").runs
    plain = lora[MMALIGN].operations
    assert plain == lora[COPIED.name].operations == lora[LAST.name].operations
    assert lora[CACHED.name].operations == {**plain, "reference": 0}
    assert full[MAPO.name].operations == {**full[MMALIGN].operations, "reference": 0}
    assert full[MMALIGN].operations["reference"] == full[MMALIGN].operations["policy"] > 0
    assert 0 < plain["reference"] < plain["policy"]
    assert plain["data"] == 0 < lora[UNCACHED.name].operations["data"] == lora["diffusers"].operations["data"]
    for part in ("reference", "policy", "backward"):
        assert lora["diffusers"].operations[part] == plain[part] > 0
    # Half of the forward pass runs again, except its last layer.
    assert lora[SEQUENCE.name].repeated * 2 == pytest.approx(plain["policy"], rel=0.02)
    assert lora[MMALIGN].repeated == 0


def test_variants_compute_the_same(measured: Callable[[str], Report]) -> None:
    """A frozen copy equals the model without its adapters, and a cache returns the stored values."""
    lora, full = measured("lora").ratios, measured("full").ratios
    for ratio in (lora[f"{COPIED.name} / {MMALIGN}"], lora[f"{UNCACHED.name} / {MMALIGN}"]):
        assert ratio["loss apart"] == ratio["gradient apart"] == 0
    for ratio in (full[f"{LOOPED.name} / {MMALIGN}"], full[f"{CHECKPOINTED.name} / {MMALIGN}"]):
        assert ratio["loss apart"] == ratio["gradient apart"] == 0
    for name in (SEQUENCE.name, LAST.name, "diffusers"):  # these sum in another order
        for apart in (lora[f"{name} / {MMALIGN}"][of] for of in ("loss apart", "gradient apart")):
            assert isinstance(apart, float) and apart < 1e-4
    assert f"diffusers / {UNCACHED.name}" in lora


def test_memory_is_that_of_a_variant(measured: Callable[[str], Report], tiny_sd15: Path) -> None:
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")
    megabytes, lora, full = sum(p.nbytes for p in net.parameters()) / 1e6, measured("lora"), measured("full")
    for ratio, sign in ((lora.ratios[f"{COPIED.name} / {MMALIGN}"], 1), (full.ratios[f"{MAPO.name} / {MMALIGN}"], -1)):
        assert ratio["expected MB more"] == pytest.approx(sign * megabytes)
        assert ratio["peak MB more"] == pytest.approx(sign * megabytes, rel=0.01)
    assert lora.runs[SEQUENCE.name].step_bytes < 0.8 * lora.runs[MMALIGN].step_bytes


@pytest.mark.parametrize("title", [*STUDIES, *STUDIES_CUDA])
def test_every_study_has_recipes(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are written, and the baseline's package need not be installed."""
    study = {**STUDIES, **STUDIES_CUDA}[title]
    make: Any = study.content
    content = cases.content(*make.args, tmp_path) if isinstance(make, partial) else make(tmp_path)
    monkeypatch.setattr(performance.against, "with_alike", lambda request, _: request)
    entries = performance.entries_of(study, content)
    assert list(entries) == [MMALIGN, *(v.name for v in study.variants), *([study.peer] if study.peer else [])]
    assert {entry.recipe.output for entry in entries.values()} == {str(tmp_path / "output")}


def test_spo_with_two_forwards_has_twice_the_rows(tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Its loss and gradient are the same."""
    method = {"name": "spo", "steps": 4, "start": 2, "threshold": 0.0, "reward": {"path": str(tiny_clip)}}
    content, firsts, operations = recipes.diffusion_in(tiny_sd15, tmp_path, method=method), [], []
    for variant in (PLAIN, TWICE):
        run = build(content, variant, tmp_path / variant.name, 2)
        firsts.append(first_gradient(run))
        operations.append(count_operations(run)[0]["policy"])
        run.train_state.accelerator.free_memory()
    apart = firsts[1].apart(firsts[0])
    assert apart is not None and apart[0] < 1e-6 and apart[1] < 1e-4
    assert operations[1] == 2 * operations[0] > 0


def test_shared_prompts_save_their_operations(vlm_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A decoder's operations are nearly proportional to its tokens; attention is a small part of them here."""
    content = recipes.vlm(vlm_folders("llava"), data_files.response_pairs(tmp_path / "rows"), tmp_path / "run")
    operations = {}
    for variant in (PLAIN, UNPACKED):
        run = build(content, variant, tmp_path / variant.name, 2)
        rows = next(run.data_module.batches(0)).tokens.rows
        operations[variant.name] = count_operations(run)[0]["policy"]
        run.train_state.accelerator.free_memory()
    prompts = {(row.ids[: row.start], row.images): row.start for row in rows}
    responses = sum(len(row.response) for row in rows)
    tokens = sum(prompts.values()) + responses, sum(row.start for row in rows) + responses
    assert operations[UNPACKED.name] / operations[MMALIGN] == pytest.approx(tokens[1] / tokens[0], rel=0.05)
    assert tokens[1] > 1.3 * tokens[0]


def test_changed_runs_are_as_their_names_say(tiny_sd15: Path, tmp_path: Path) -> None:
    content = recipes.diffusion_in(tiny_sd15, tmp_path)
    run = build(content, LAST, tmp_path / "last", 1)
    kernels = [p for p in run.policy.unwrapped.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=performance.torch.channels_last) for p in kernels)
    for variant, fused in ((PLAIN, True), (LOOPED, False)):
        run = build(content, variant, tmp_path / variant.name, 1)
        assert all(group["fused"] is fused for group in run.train_state.optimizer.param_groups)
    run.train_state.accelerator.free_memory()


def test_tables_reach_the_document(
    measured: Callable[[str], Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, document = tmp_path / "performance.json", tmp_path / "performance.md"
    write_json(saved, {name: asdict(measured(name)) for name in ("lora", "full")})
    document.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # a second write changes nothing
        performance.main(["--from", str(saved), "--markdown", str(document)])
        text = document.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    variants = [*LORA_VARIANTS, *FULL_VARIANTS]
    assert all(f"| {variant.name} | " in text and f"| {variant.name} / {MMALIGN} |" in text for variant in variants)
    assert all(text.count(f"- {variant.name} / {MMALIGN}: {variant.why}.") == 1 for variant in variants)
    shown = capsys.readouterr().out
    assert "pairs/s" in shown and "gradient apart" in shown
    document.write_text("no markers")
    with pytest.raises(ValueError, match="measured: begin"):
        performance.write_markdown([], document)
