"""`mmalign bench` on tiny models: parts, ratios, what is expected of them, and another program computes the same."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from mmalign import methods
from mmalign.benchmark import bench, cases, measure, runs, tables
from mmalign.benchmark.bench import OURS, Asked
from mmalign.benchmark.meters import Meter
from mmalign.benchmark.tables import Report
from mmalign.cli import app
from mmalign.commands import cache
from mmalign.commands.load_recipe import load_recipe
from mmalign.families.diffusion import pipeline
from tests.helpers import recipes

OFF, CHECKPOINTED = "data.cache='off'", "train.gradient_checkpointing=true"


@pytest.fixture(scope="module")
def report(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("bench")
    asked = Asked(
        recipes.diffusion_in(tiny_sd15, folder, model={"tune": "lora"}), (), [[OFF], [CHECKPOINTED]], "diffusers"
    )
    return bench.run(asked, folder, Accelerator(), name="tiny", repeats=1, say=lambda _: None)


def rows(report: Report) -> dict[str, measure.Measured]:
    return {row.variant: row for row in next(iter(report.models.values()))}


def test_every_entrant_has_its_parts(report: Report) -> None:
    assert list(rows(report)) == [OURS, OFF, CHECKPOINTED, "diffusers"]
    for row in rows(report).values():
        parts = ("data", "noise", "reference", "policy", "backward", "optimizer")
        assert all(row.parts[part][0] > 0 for part in parts)


def test_the_other_program_computes_the_same(report: Report) -> None:
    """In float32 its encoders round otherwise, since they take a whole batch: by 1e-6 of a latent, times beta / 2."""
    theirs = rows(report)["diffusers"]
    assert theirs.loss_apart is not None and theirs.loss_apart < 1e-4
    assert theirs.gradient_apart is not None and theirs.gradient_apart < 1e-4


def test_what_is_no_different_computes_the_same(report: Report) -> None:
    for name in (OFF, CHECKPOINTED):
        assert rows(report)[name].loss_apart == 0
    assert rows(report)[OFF].gradient_apart == 0


def test_what_is_expected_follows_from_operations(report: Report) -> None:
    """Both sides run the network three times over; the other program runs the encoders besides."""
    ours, theirs = rows(report)[OURS].flops, rows(report)["diffusers"].flops
    assert {part: theirs[part] for part in ("reference", "policy", "backward")} == {
        part: ours[part] for part in ("reference", "policy", "backward")
    }
    assert ours["data"] == 0 < theirs["data"] == rows(report)[OFF].flops["data"]
    ratio = tables.summary(report)[next(iter(report.models))]["ratios"][f"diffusers / {OURS}"]
    assert ratio["by_operations"] == pytest.approx(sum(theirs.values()) / sum(ours.values()))
    assert ratio["of_that"] == pytest.approx(ratio["time"] / ratio["by_operations"])


def test_repetitions_are_no_operations_of_the_model(report: Report) -> None:
    plain, again = rows(report)[OURS], rows(report)[CHECKPOINTED]
    assert plain.flops == again.flops
    assert plain.repeated == 0 < again.repeated < again.flops["policy"]
    assert again.beyond < plain.beyond


def test_the_tables_say_what_is_expected(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    title, found = next(iter(report.models.items()))
    head, *lines = tables.comparisons(report, found)
    assert head[3:7] == ["time: by operations", "measured", "of that", "one epoch"]
    assert [line[0] for line in lines] == [f"{name} / {OURS}" for name in (OFF, CHECKPOINTED, "diffusers")]
    assert lines[0][1:4] == ["0e+00", "0e+00", lines[2][3]]  # as of the other program, which has no caches either
    costs = tables.costs(report, found)
    assert all(line[costs[0].index("of peak")].endswith("%") for line in costs[1:])
    tables.show(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert title in shown and "CPU seconds, of all threads together; runs take turns" in shown


def test_the_parts_add_up_to_the_whole(tiny_sd15: Path, tmp_path: Path) -> None:
    """Operations, which unlike seconds are exact: those of the parts are those of updates without a meter."""
    found = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, train={"accumulate": 2}))
    run = runs.build(found, tmp_path / "run", Accelerator(), updates=4)
    assert run.pairs == 4
    runs.advance(run, 1)
    flops, repeated = runs.count_operations(run)
    with runs.Operations() as counter:
        runs.advance(run, 1)
    assert sum(flops.values()) == counter.get_total_flops() > 0 and repeated == 0
    clock = iter(range(1000))
    meter = Meter(lambda: float(next(clock)))
    runs.advance(run, 1, meter)
    meter.switch("rest")
    assert sum(meter.total.values()) == next(clock) - 1  # no reading of the clock is lost


def test_from_the_command_line(tiny_sd15: Path, tmp_path: Path) -> None:
    import yaml

    file, numbers = tmp_path / "recipe.yaml", tmp_path / "numbers" / "bench.json"
    file.write_text(yaml.dump(recipes.diffusion_in(tiny_sd15, tmp_path)))
    done = CliRunner().invoke(app, ["bench", str(file), "--repeats", "1", "--json", str(numbers)])
    assert done.exit_code == 0, done.output
    found = json.loads(numbers.read_text())
    (summary,) = found["summary"].values()
    assert 0 < summary["entrants"][OURS]["share_of_peak"] < 1
    assert not (tmp_path / "output").exists()  # the recipe's own folder is left alone


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.yaml"], "there is no file or folder"),
        (["sd_middle", "--against", "difusers"], "did you mean 'diffusers'"),
        (["sd_middle", "--repeats", "0"], "expected at least 1, got 0"),
        (["sdxl_lora"], "needs a CUDA device"),
        (["sd_middle", "--set", "train.precision=float16"], "float16 needs a GPU"),
        (["llava_middle", "--against", "diffusers"], "got name: dpo"),
        (["sd_middle", "--values", "1"], "need --scale"),
        (["sd_middle", "--scale", "size"], "expected one of pairs, resolution"),
        (["sd_middle", "--scale", "pairs", "--values", "1,2"], "with spaces between them"),
        (["sd_middle", "--scale", "pairs", "--values", "0"], "at least 1, got 0"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 1 and sentence in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 2),  # both images of a pair
        (["method.cache_draws=2"], 2 + 4 / 8),  # and once every batch of an epoch of eight pairs, of two epochs
        ([OFF], 0),
    ],
)
def test_filling_is_what_one_epoch_needs(
    overrides: list[str], expected: float, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks with every image encoded and with every batch that the reference scores."""
    ticks, open_feed = [0], cache.open_feed

    def slow(*args: Any, **kwargs: Any) -> Any:
        ticks[0] += 100  # which is not filling: without anything to fill it takes as long
        return open_feed(*args, **kwargs)

    def ticking(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ticks[0] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(pipeline, "encode", ticking(pipeline.encode))
    monkeypatch.setattr(methods, "worked_out", ticking(methods.worked_out))
    monkeypatch.setattr(cache, "open_feed", slow)
    monkeypatch.setattr(runs, "now", lambda _: float(ticks[0]))
    found = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path), overrides)
    run = runs.build(found, tmp_path / "run", Accelerator(), updates=8)
    assert run.filling == expected
    before = ticks[0]
    runs.advance(run, 8)
    assert ticks[0] == before + (8 * 2 * 2 if OFF in overrides else 0)  # all that the updates need is there


def test_one_epoch_pays_for_what_is_kept() -> None:
    """A pair in 1 s, and in 0.5 s with 0.25 s beforehand: 2 times as fast, and 4 / 3 in a training of one epoch."""
    report = two_by_hand()
    (found,) = tables.summary(report)["by hand"]["ratios"].values()
    assert found["time"] == 2 and found["one_epoch"] == pytest.approx(4 / 3)
    head, line = tables.comparisons(report, report.models["by hand"])
    assert line[head.index("one epoch")] == "1.33"
    head, theirs, ours = tables.costs(report, report.models["by hand"])
    assert (theirs[head.index("kept beforehand")], ours[-1]) == ("", "250.0 ms a pair, once")


def test_shares_are_those_of_a_process() -> None:
    """Of two processes each does 100 operations a second of the 200 that it can, for 2 of the 4 pairs; 100 bytes."""
    report = two_by_hand()
    theirs = report.models["by hand"][0]
    assert tables.summary(report)["by hand"]["entrants"]["theirs"]["share_of_peak"] == 0.5
    assert theirs.bytes_of_a_pair == 50 and theirs.seconds_of_a_pair == [1]


def two_by_hand() -> Report:
    """Two entrants on two processes, 4 pairs an update."""
    shared: dict[str, Any] = {"batch_size": 4, "parts": {"policy": [1.0]}, "state_bytes": 10, "processes": 2}
    shared |= {"peak_bytes": 110, "weight_bytes": 10, "loss_apart": 0.0, "gradient_apart": 0.0}
    theirs = measure.Measured("theirs", whole=[4.0], flops={"policy": 400}, **shared)
    ours = measure.Measured("ours", whole=[2.0], flops={"policy": 200}, filling=0.25, **shared)
    made: dict[str, str | int] = {
        "gpu": "none",
        "cpu": "a CPU",
        "threads": 1,
        "cores": 2,
        "torch": "2",
        "date": "today",
    }
    return Report(made, {"by hand": [theirs, ours]}, [tables.Comparison("theirs", "ours", "why")], 200.0)


class Double:
    """An accelerator that says it is one of two."""

    num_processes = 2

    def __init__(self) -> None:
        self.inner = Accelerator()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_report_of_two_processes_is_in_units_of_one(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "peak_rate", lambda *_: 1e12)
    asked = Asked(recipes.diffusion_in(tiny_sd15, tmp_path), [OFF])  # the other's share of the caches would be missing
    report = bench.run(asked, tmp_path, Double(), name="tiny", repeats=1, say=lambda _: None)
    ((title, (row,)),) = report.models.items()
    assert title.endswith("2 pairs on each of 2 processes")
    assert (report.peak_rate, row.processes, row.batch_size) == (1e12, 2, 4)


def test_a_method_with_many_updates_of_a_batch_is_measured_in_whole_batches(
    tiny_sd15: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """SPO makes two contrasts of every batch here, which none but the process that drew them can go on with."""
    method = {"name": "spo", "steps": 4, "start": 2, "threshold": 0.0, "judge": {"path": str(tiny_clip)}}
    given = recipes.diffusion_in(tiny_sd15, tmp_path, method=method)
    run = runs.build(load_recipe(given), tmp_path / "run", Accelerator(), updates=8)
    assert [runs.advance(run, updates) for updates in (1, 2, 3)] == [2, 2, 4]
    assert run.progress.pending == 0 and run.progress.step == 8 and run.progress.batch + 2 * run.progress.epoch == 4
    rows = measure.measure(
        [measure.Entrant("spo", partial(runs.build, load_recipe(given), accelerator=Accelerator()))],
        tmp_path / "rows",
        repeats=1,
        device=torch.device("cpu"),
        say=lambda _: None,
    )
    assert rows[0].flops["noise"] > rows[0].flops["policy"] > 0  # it draws what it learns from


def test_starting_workers_is_not_measured(tiny_sd15: Path, tmp_path: Path) -> None:
    found = runs.shortened(load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, data={"workers": 2})), tmp_path, 1, 1)
    assert found.data.workers == 0


def test_gradients_are_scaled_for_all_or_for_none(tiny_sd15: Path, tmp_path: Path) -> None:
    asked = Asked(recipes.diffusion_in(tiny_sd15, tmp_path), variants=[["train.precision=float16"]])
    with pytest.raises(
        ValueError, match="precision: float16 beside float32, and gradients are scaled in float16 alone"
    ):
        bench.accelerator_for(asked)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_is_counted_as_another(tiny_sd15: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    found = {}
    for on in (False, True):
        given = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, model={"tune": "lora"}, train={"compile": on}))
        run = runs.build(given, tmp_path / f"{on}", Accelerator(), updates=4)
        runs.advance(run, 1)
        found[on] = runs.count_operations(run), runs.peak_bytes(run, 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
    assert found[True] == found[False]
    torch._dynamo.reset()


def test_pairs_that_fill_no_batch_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    few = Asked(recipes.diffusion_in(tiny_sd15, tmp_path, train={"batch_size": 9}))
    with pytest.raises(ValueError, match="has 8 pairs, and a batch has 9"):
        bench.run(few, tmp_path, Accelerator(), name="few", repeats=1, say=lambda _: None)


def test_a_case_is_a_recipe(tmp_path: Path) -> None:
    """Every case's settings are a recipe's, and only those for a CPU are small enough to be written here."""
    for name in cases.names():
        found = load_recipe(cases.content(name, tmp_path))
        assert found.model.path == str(tmp_path / "model") and found.output == str(tmp_path / "output")
        assert name in " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output.split())
    assert [name for name in cases.names() if not cases.CASES[name].gpu] == ["sd_middle", "llava_middle"]
