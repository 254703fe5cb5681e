"""`mmalign bench` on tiny models: parts of a step, operations, memory, and variants."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.commands import bench as command
from mmalign.commands._bench_meters import Meter, Operations
from mmalign.commands._bench_run import build, count_operations, peak_bytes, shorten
from mmalign.commands.bench import MMALIGN, Measured, Report, bench, costs, ratios
from mmalign.commands.load_recipe import load_recipe
from tests.helpers import recipes
from tests.helpers.compiling import traced

pytestmark = pytest.mark.xdist_group("bench")  # its fixture runs once

OFF, CHECKPOINTED, NO_REFERENCE = "data.cache='off'", "train.gradient_checkpointing=true", "method.name=mapo"


@pytest.fixture(scope="module")
def report(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    content = recipes.diffusion_in(tiny_sd15, tmp_path_factory.mktemp("bench"), model={"tune": "lora"})
    content["method"] = {"name": "diffusion_dpo"}
    return bench(content, variants=[OFF, CHECKPOINTED, NO_REFERENCE], repeats=1)


@pytest.mark.slow
def test_bench_measures_every_part_of_every_run(report: Report) -> None:
    assert list(report.runs) == [MMALIGN, OFF, CHECKPOINTED, NO_REFERENCE]
    for name, run in report.runs.items():
        for part in ("data", "noise", "policy", "backward", "optimizer"):
            assert run.parts[part][0] > 0
        assert (run.parts["reference"][0] > 0) == (name != NO_REFERENCE)


def test_bench_expects_time_by_operations(report: Report) -> None:
    """Without a cache the encoders run in every step, and everything else stays the same."""
    run, uncached = report.runs[MMALIGN], report.runs[OFF]
    assert {**uncached.operations, "data": 0} == run.operations
    assert uncached.operations["data"] > 0
    ratio = report.ratios[f"{OFF} / {MMALIGN}"]
    assert ratio["time by operations"] == pytest.approx(
        sum(uncached.operations.values()) / sum(run.operations.values())
    )


def test_bench_counts_repeated_operations_apart(report: Report) -> None:
    run, checkpointed = report.runs[MMALIGN], report.runs[CHECKPOINTED]
    assert run.operations == checkpointed.operations
    assert run.repeated == 0 < checkpointed.repeated < checkpointed.operations["policy"]
    assert checkpointed.step_bytes < run.step_bytes


@pytest.mark.slow
def test_parts_add_up_to_the_update(tiny_sd15: Path, tmp_path: Path) -> None:
    """Operations of the parts are those of an update without a meter, and no reading of a clock is lost."""
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, train={"gradient_accumulation_steps": 2}))
    run = build(recipe, Accelerator(), tmp_path / "run", 4)
    run.updates(run, 1, None)
    operations, repeated = count_operations(run)
    with Operations() as counter:
        run.updates(run, 1, None)
    assert sum(operations.values()) == counter.get_total_flops() > 0 and repeated == 0
    clock = iter(range(1000))
    meter = Meter(lambda: float(next(clock)))
    run.updates(run, 1, meter)
    meter.switch("rest")
    assert sum(meter.totals.values()) == next(clock) - 1


def test_costs_and_ratios_by_hand() -> None:
    """4 pairs in 4 s by 400 operations, beside 4 pairs in 2 s by 200 and 100 repeated ones; a device of 200/s."""
    slow = Measured(4, {"policy": 400}, 0, 10, 100, [4.0], {"policy": [3.0]})
    fast = Measured(4, {"policy": 200}, 100, 10, 50, [2.0], {"policy": [1.0]})
    cost = costs(fast, 200)
    assert (cost["pairs/s"], cost["policy ms"], cost["share of peak"], cost["peak MB"]) == ([2.0], 1000, 0.5, 60 / 1e6)
    ratio = ratios(slow, fast)
    assert (ratio["time"], ratio["peak MB more"], ratio["memory without weights"]) == ([2.0], 50 / 1e6, 2)
    assert ratio["time by operations"] == pytest.approx(4 / 3)
    assert ratio["measured / by operations"] == pytest.approx(2 / (4 / 3))


def test_two_generated_images_are_a_pair(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 prompts of 6 images, 3 times in an update, on 2 processes: as the log of a training counts them."""
    method = {"name": "dgpo", "reward": {"path": "x"}, "generation": {"images": 6}}
    train = {"batch_size": 2, "gradient_accumulation_steps": 3}
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, method=method, train=train))
    for name, result in (("weights", []), ("peak_bytes", 0), ("count_operations", ({}, 0))):
        monkeypatch.setattr(command, name, lambda *_, result=result: result)
    state = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    run: Any = SimpleNamespace(recipe=recipe, train_state=state, updates=lambda *_: 1)
    assert command.count(run, 0).num_pairs == 2 * 3 * 2 * 3


@pytest.mark.slow
def test_bench_command_writes_numbers(tiny_sd15: Path, tmp_path: Path) -> None:
    file, numbers = tmp_path / "recipe.yaml", tmp_path / "numbers" / "bench.json"
    file.write_text(yaml.dump(recipes.diffusion_in(tiny_sd15, tmp_path)))
    result = CliRunner().invoke(app, ["bench", str(file), "--repeats", "1", "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    content = json.loads(numbers.read_text())
    assert 0 < content["costs"][MMALIGN]["share of peak"] < 1
    assert content["machine"]["seconds"] == "CPU time of all threads"
    assert "pairs/s" in result.output and "peak MB" in result.output
    assert not (tmp_path / "output").exists()  # the recipe's own folder stays as it was


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({}, ["--repeats", "0"], ("--repeats", "0")),
        ({}, ["--set", "train.precision=float16"], ("float16", "GPU")),
        ({}, ["--variant", "train.precision=float16"], ("--variant", "float32, float16")),
        ({}, ["--variant", "train.lrr=1"], ("lrr", "lr")),
        ({"train": {"batch_size": 9}}, [], ("data.path", "8 pairs", "9")),
    ],
)
def test_bench_command_refuses_mistakes(
    changes: dict[str, Any],
    arguments: list[str],
    parts: tuple[str, ...],
    tiny_sd15: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump(recipes.diffusion_in(tiny_sd15, tmp_path, **changes)))
    result = CliRunner().invoke(app, ["bench", str(file), *arguments])
    assert result.exit_code == 1 and all(part in result.output for part in parts), result.output


class Double:
    """An accelerator that claims to be one of two."""

    num_processes = 2

    def __init__(self) -> None:
        self.inner = Accelerator()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.slow
def test_bench_of_two_processes_counts_all_pairs(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_accelerator", lambda *_, **__: Double())
    # With a cache, the other process' share of it would be missing.
    report = bench(recipes.diffusion_in(tiny_sd15, tmp_path), overrides=[OFF], repeats=1)
    assert report.title.endswith("2 pairs on each of 2 processes")
    assert report.runs[MMALIGN].num_pairs == 4


@pytest.mark.slow
def test_spo_is_measured_in_whole_batches(tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """SPO makes two updates of a batch here, and only the process that generated it can continue with it."""
    method = {"name": "spo", "steps": 4, "start": 2, "threshold": 0.0, "reward": {"path": str(tiny_clip)}}
    content = recipes.diffusion_in(tiny_sd15, tmp_path, method=method)
    run = build(load_recipe(content), Accelerator(), tmp_path / "run", 8)
    assert [run.updates(run, updates, None) for updates in (1, 2, 3)] == [2, 2, 4]
    assert run.progress.pending == 0 and run.progress.step == 8 and run.progress.batch + 2 * run.progress.epoch == 4
    measured = bench(content, repeats=1).runs[MMALIGN]
    assert measured.operations["noise"] > measured.operations["policy"] > 0  # it generates its images


def test_bench_starts_no_workers(tiny_sd15: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, data={"num_workers": 2}))
    assert shorten(recipe, tmp_path, 1, 1).data.num_workers == 0


@pytest.mark.slow
def test_compiled_run_has_the_same_counts(tiny_sd15: Path, tmp_path: Path) -> None:
    counts = {}
    with traced():
        for compiled in (False, True):
            sections: dict[str, Any] = {"model": {"tune": "lora"}, "train": {"compile": compiled}}
            recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, **sections))
            run = build(recipe, Accelerator(), tmp_path / f"{compiled}", 4)
            run.updates(run, 1, None)
            counts[compiled] = count_operations(run), peak_bytes(run, 0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
    assert counts[True] == counts[False]
