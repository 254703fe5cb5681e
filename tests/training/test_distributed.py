"""Two processes train as one does with the same global batch: the same weights, the same numbers, the same folder."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from tests.helpers import Folders, data_files, processes, recipes
from tests.helpers.logged import recorded_lines
from tests.helpers.processes import GRADIENTS, WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]  # one server forks them

Content = dict[str, Any]
STEPS = 3
UNSURE = 0.01  # a threshold at which the tiny judge is sure of some comparisons, and of others not
METRICS = {"rel": 1e-3, "abs": 1e-4}  # a logit is beta = 100 times a difference of errors, each rounded by 1e-7


class Runs:
    """Trainings by name: in one process under `one/`, in two under `two/`."""

    def __init__(self, folder: Path, model: Path, judge: Path, decoder: Path) -> None:
        self.folder, self.model, self.judge, self.decoder = folder, model, judge, decoder
        moving = {"name": "diffusion_dpo", "beta": 100.0, "reference": {"every": 1, "mix": 0.5}}
        often = {"steps": STEPS, "save_every": 1, "keep_checkpoints": 9}
        full = {"train": {**often, "max_grad_norm": None, "ema": 0.9, "trackers": ["tensorboard"], "sample_every": 2}}
        lora = {"model": {"tune": "lora"}, "data": {"validation_fraction": 0.2}, "train": {**often, "lr": 0.03}}
        inpo = {"name": "inpo", "beta": 100.0, "steps": 3}
        # One image at a time: in other batches pixels are rounded otherwise
        generation = {"images": 3, "steps": 2, "noisings": 1, "batch_size": 1}
        reward = {"name": "step_aware", "path": str(judge)}
        online = {"name": "diffusion_online_dpo", "beta": 100.0, "reward": reward, "generation": generation}
        group = {"name": "dgpo", "beta": 100.0, "reward": reward, "reference": {"every": 1, "mix": 1.0}}
        group["generation"] = {**generation, "noisings": 2}  # both in one update, so that each can be saved
        uncached = {"model": {"tune": "full"}, "data": {"cache": "off"}, "train": often}
        self.recipes: dict[str, tuple[str, Content]] = {
            "full": ("eight", {"method": moving, **full}),
            "lora": ("ten", lora),
            "uneven": ("bad", {"method": {"name": "mapo"}, "train": often}),
            "few": ("few", {"method": {"name": "sft"}, "train": often}),
            "generated": ("eight", {"method": online, "train": often}),
            "group": ("eight", {"method": group, "train": {**often, "gradient_accumulation_steps": 2}}),
            "inverted": ("eight", {"method": inpo, "train": often}),
            "kept": ("eight", {"method": {**inpo, "inverter": "reference", "num_cached_draws": 1}, "train": often}),
            "pictures": ("eight", uncached),
            "responses": ("rows", uncached),
        }

    def make(self) -> None:
        """Every training that the tests look at; two processes are started once, since that is what takes the time."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        data_files.pick_a_pic(self.folder / "eight.parquet")  # four pairs an update: the third is of another epoch
        data_files.pick_a_pic(self.folder / "ten.parquet", number=10)
        data_files.pick_a_pic(self.folder / "bad.parquet", bad={0: b"", 3: b"", 5: b"no image"})
        data_files.pick_a_pic(self.folder / "few.parquet", number=3)
        data_files.response_pairs(self.folder / "rows")
        for name in self.recipes:
            self.alone(name, batch_size=4)
        for location, batch_size in (("double", 8), ("half", 2)):
            self.alone("full", location, batch_size=batch_size)
        self.copy_stopped("one/full", "two/grown")
        small = {"batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
        jobs = [
            ("full", self.content("two", "full", batch_size=2)),
            ("again", self.content("two", "full", batch_size=2)),
            ("stopped", self.content("two", "full", "stopped", batch_size=2, steps=1)),
            ("resumed", self.content("two", "full", "stopped", batch_size=2)),
            ("grown", self.content("two", "full", "grown", batch_size=2)),
            ("lora", self.content("two", "lora", **small)),
            ("uneven", self.content("two", "uneven", batch_size=2)),
            *((name, self.content("two", name, batch_size=2)) for name in NAMES[3:]),
        ]
        for name in ("pictures", "responses"):
            given = self.content("two", name, f"{name} cached", batch_size=2)
            given["data"]["cache"] = "auto"
            jobs += [(f"{name} filled", given), (f"{name} cached", given)]
        judge = {"name": "step_aware", "path": str(self.judge)}
        drawing = {"name": "spo", "reward": judge, "steps": 6, "start": 2, "threshold": UNSURE}
        jobs.append(("spo", self.content("two", "few", "spo", batch_size=1) | {"method": drawing}))
        jobs += self.sharded(small)
        processes.launch(
            self.folder, [(name, "cache" if name.endswith(" filled") else "train", content) for name, content in jobs]
        )
        self.copy_stopped("sharded/full", "one/shrunk")
        self.alone("full", output="shrunk", batch_size=4)

    def copy_stopped(self, run: str, copy: str) -> None:
        """Copy a run as if it had been killed after the first update."""
        shutil.copytree(self.folder / run, self.folder / copy)
        for step in range(2, STEPS + 1):
            shutil.rmtree(self.folder / copy / f"checkpoint-{step:08d}")

    def sharded(self, small: Content) -> list[tuple[str, Content]]:
        """Return the trainings of two processes that split the model."""
        half: Content = {"batch_size": 2, "sharding": "fsdp2"}
        shutil.copytree(self.folder / "two" / "grown", self.folder / "sharded" / "grown")
        names = {"full": half, "lora": {**small, "sharding": "fsdp2"}, "inverted": half, "responses": half}
        jobs = [(f"{name} sharded", self.content("sharded", name, **options)) for name, options in names.items()]
        for name, output, options in (
            ("stopped", "stopped", {"steps": 1}),
            ("resumed", "stopped", {}),
            ("grown", "grown", {}),
        ):
            jobs.append((f"{name} sharded", self.content("sharded", "full", output, **half, **options)))
        return jobs

    def content(self, location: str, name: str, output: str = "", **options: Any) -> Content:
        pairs, sections = self.recipes[name]
        filled = {**sections, "train": {**sections["train"], **options}}
        if pairs == "rows":
            rows = self.folder / pairs / "trl.jsonl"
            return recipes.vlm(self.decoder, rows, self.folder / location / (output or name), **filled)
        return recipes.diffusion(
            self.model, self.folder / f"{pairs}.parquet", self.folder / location / (output or name), **filled
        )

    def alone(self, name: str, location: str = "one", output: str = "", **options: Any) -> None:
        """A training in this process."""
        with recorded_lines() as lines:
            trained = train(load_recipe(self.content(location, name, output, **options)))
        record = {"history": trained.history, "lines": lines}
        (self.folder / f"{output or name}-{location}.json").write_text(json.dumps(record))

    def record(self, name: str, who: str | int) -> dict[str, Any]:
        """Read the record of a training: of one of two processes (0 or 1), or of the only one ("one")."""
        return processes.read(self.folder, name, who)

    def distance(self, run: str, other_run: str) -> tuple[float, float]:
        return processes.distance(self.folder / run, self.folder / other_run, STEPS)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_sd15: Path,
    tiny_step_judge: Path,
    vlm_folders: Folders,
) -> Runs:
    """Made once, also where several test workers share this file."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    runs = Runs(shared / "distributed", tiny_sd15, tiny_step_judge, vlm_folders("llava"))
    done = shared / "distributed.done"
    with FileLock(shared / "distributed.lock"):
        if not done.exists():
            runs.make()
            done.touch()
    return runs


NAMES = ["full", "lora", "uneven", "few", "generated", "group", "inverted", "kept", "responses"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_one_process(name: str, runs: Runs) -> None:
    """All weights with an average, adapters with accumulated gradients, unequal shares of a batch, padding, inversions
    of which one process's take longer, those that both have worked out before, generated pairs and groups of images,
    and responses that share their prompts.
    """
    weights, gradients = runs.distance(f"one/{name}", f"two/{name}")
    assert weights < WEIGHTS and gradients < GRADIENTS


@pytest.mark.parametrize("batch", ["double", "half"])
def test_another_global_batch_would_be_noticed(batch: str, runs: Runs) -> None:
    """With "half" of it each process would learn as if it had never heard of the other."""
    weights, gradients = runs.distance("one/full", f"{batch}/full")
    assert weights > 20 * WEIGHTS and gradients > 1000 * GRADIENTS
    history, other_history = runs.record("full", "one")["history"], runs.record("full", batch)["history"]
    assert history[0]["gradient norm"] != pytest.approx(other_history[0]["gradient norm"], **METRICS)
    assert history[0]["chosen error"] != pytest.approx(other_history[0]["chosen error"], **METRICS)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_sentences_are_those_of_one_process(name: str, runs: Runs) -> None:
    """The means of the whole batch on both processes; one of them speaks, and counts the bad images of both."""
    alone, first, second = (runs.record(name, who) for who in ("one", 0, 1))
    lines, history = alone["lines"], alone["history"]
    assert first["history"] == second["history"] and len(history) == STEPS
    for actual, expected in zip(history, first["history"], strict=True):
        assert actual == pytest.approx(expected, **METRICS)
    assert second["lines"] == []
    counts, numbers = re.compile(r"^\d+ images"), re.compile(r"[-+]?\d+(\.\d+)?(e-\d+)?")
    assert [counts.findall(line) for line in first["lines"]] == [counts.findall(line) for line in lines]
    # The order of the bad images is that in which they were met, and a verdict's last digit may be rounded.
    # The line "update: 2 processes x 1 pairs ..." tells of the processes, the last ones of the folder.
    both = (
        [line.replace("processes", "process").replace(str(runs.folder / where), "") for line in some]
        for where, some in (("two", first["lines"]), ("one", lines))
    )
    assert len({str([sorted(numbers.sub("", line)) for line in some]) for some in both}) == 1


def test_held_out_pairs_give_the_score_of_one_process(runs: Runs) -> None:
    scores = [
        json.loads((runs.folder / location / "lora" / f"checkpoint-{step:08d}" / "checkpoint.json").read_text())[
            "score"
        ]
        for location in ("one", "two")
        for step in range(1, STEPS + 1)
    ]
    assert all(scores) and scores[:STEPS] == pytest.approx(scores[STEPS:], **METRICS)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exchanged_once_an_update(name: str, runs: Runs) -> None:
    """Also where an update adds up several batches: what is sent in between is sent for nothing."""
    assert [runs.record(name, rank)["exchanges"] for rank in (0, 1)] == [STEPS, STEPS]


def test_one_process_writes_and_the_folder_is_that_of_one(runs: Runs) -> None:
    """Both fill the caches, each with its share; all else is the first one's."""
    output = runs.folder / "two" / "full"
    places = [set[str](), set[str]()]
    for rank, result in enumerate(places):
        for path in map(Path, runs.record("full", rank)["touched"]):
            if output in path.parents and not path.name.startswith("tmp"):  # whether the folder may be written to
                result.add(path.relative_to(output).parts[0])
    assert {
        "cache",
        ".recipe.yaml.mmalign-part",
        ".checkpoint-00000003.mmalign-part",
        ".model.mmalign-part",
        "mmalign",
    } <= places[0]
    assert places[1] == {"cache"}
    assert listed(output) == listed(runs.folder / "one" / "full")


def listed(output: Path) -> list[str]:
    """The files of a run but for its caches; a tracker's names begin with the time and end with the process."""
    files = (p.relative_to(output) for p in output.rglob("*") if p.is_file())
    return sorted(re.sub(r"\d{9,}[^/]*", "*", file.as_posix()) for file in files if file.parts[0] != "cache")


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_each_process_encodes_its_share_once(kind: str, runs: Runs) -> None:
    single, double = (
        [set(load_file(shard)) for shard in (runs.folder / location / "full" / "cache" / kind).rglob("*.safetensors")]
        for location in ("one", "two")
    )
    assert len(single) == 1 and len(double) == 2
    assert double[0] | double[1] == single[0] and not double[0] & double[1]


@pytest.mark.parametrize(
    ("name", "kinds"), [("pictures", {"latents", "text"}), ("responses", {"features", "reference"})]
)
def test_shared_caches_give_one_processes_weights(name: str, kinds: set[str], runs: Runs) -> None:
    """Both write a share of each cache, and nothing more of it in the training."""
    filled = max((runs.folder / f"{name} filled-{rank}.json").stat().st_mtime for rank in (0, 1))
    caches = runs.folder / "two" / f"{name} cached" / "cache"
    shards = {path.name: list(path.rglob("*.safetensors")) for path in caches.iterdir()}
    assert {kind: len(files) for kind, files in shards.items()} == dict.fromkeys(kinds, 2)
    assert all(file.stat().st_mtime <= filled for files in shards.values() for file in files)
    weights, gradients = runs.distance(f"one/{name}", f"two/{name} cached")
    assert weights < WEIGHTS and gradients < GRADIENTS
    assert not (runs.folder / "one" / name / "cache").exists()


def test_processes_with_unequal_contrasts_train_together(runs: Runs) -> None:
    """Each has as many contrasts, some without a pair: nobody waits for ever, and both know the same numbers."""
    first, second = (runs.record("spo", rank) for rank in (0, 1))
    assert len(first["history"]) == STEPS and first["history"] == second["history"]
    assert 0 < min(h["sure"] for h in first["history"]) < 1


def test_a_finished_run_is_left_as_it_is(runs: Runs) -> None:
    lines = runs.record("again", 0)["lines"]
    assert "resuming from checkpoint-00000003" in lines and any("all updates were done already" in x for x in lines)
    assert runs.record("again", 1)["lines"] == []


def test_going_on_in_two_processes_equals_never_stopping(runs: Runs) -> None:
    """Bit for bit, in the exported average too."""
    assert "resuming from checkpoint-00000001" in runs.record("resumed", 0)["lines"]
    model = "model/unet/diffusion_pytorch_model.safetensors"
    for file in (f"checkpoint-{STEPS:08d}/model.safetensors", model):
        whole, stopped = (load_file(runs.folder / "two" / name / file) for name in ("full", "stopped"))
        assert whole.keys() == stopped.keys() and all(torch.equal(whole[n], stopped[n]) for n in whole)


def test_processes_that_do_not_know_of_each_other_are_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher on CPUs without ACCELERATE_USE_CPU: each would train alone, and all would write to one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU"):
        runs.alone("few", "unaware", batch_size=2)
    assert not list((runs.folder / "unaware" / "few").glob("checkpoint-*"))


SHARDED = ["full", "lora", "inverted", "responses"]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_and_numbers_are_those_of_one_process(name: str, runs: Runs) -> None:
    """Also with adapters, accumulation, recomputed activations, unequally long inversions, and a model of text."""
    weights, gradients = runs.distance(f"one/{name}", f"sharded/{name}")
    assert weights < WEIGHTS and gradients < GRADIENTS
    alone, first, second = (runs.record(*where) for where in ((name, "one"), *((f"{name} sharded", i) for i in (0, 1))))
    assert first["history"] == second["history"] and second["lines"] == []
    for actual, expected in zip(alone["history"], first["history"], strict=True):
        assert actual == pytest.approx(expected, **METRICS)


@pytest.mark.parametrize("name", SHARDED)
def test_each_process_holds_half_of_policy_and_reference(name: str, runs: Runs) -> None:
    """All but the vision tower: with LoRA the policy without its adapters is the reference."""
    shares = [runs.record(f"{name} sharded", rank)["held"] for rank in (0, 1)]
    assert [len(held) for held in shares] == [1 if name == "lora" else 2] * 2
    most = 0.7 if name == "responses" else 0.51  # the tiny vision tower is a third of its model
    assert all(0.49 <= share <= most for held in shares for share in held)


def test_sharded_runs_resume_bit_for_bit_and_export_a_whole_model(runs: Runs) -> None:
    """The average is exported by the first process, as files that one process would have written."""
    assert "resuming from checkpoint-00000001" in runs.record("resumed sharded", 0)["lines"]
    exported = "model/unet/diffusion_pytorch_model.safetensors"
    for file in (f"checkpoint-{STEPS:08d}/model.safetensors", exported):
        whole, stopped = (load_file(runs.folder / "sharded" / name / file) for name in ("full", "stopped"))
        assert whole.keys() == stopped.keys() and all(torch.equal(whole[n], stopped[n]) for n in whole)
    outputs = [runs.folder / location / "full" for location in ("one", "sharded")]
    assert listed(outputs[0]) == listed(outputs[1])
    alone, sharded = (load_file(output / exported) for output in outputs)
    assert {name: x.shape for name, x in alone.items()} == {name: x.shape for name, x in sharded.items()}
    assert all(torch.allclose(alone[name], sharded[name], atol=1e-4) for name in alone)
    configs = [json.loads((output / "model" / "model_index.json").read_text()) for output in outputs]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("name", "rank", "output"),
    [("grown sharded", 0, "sharded/grown"), ("grown", 0, "two/grown"), ("shrunk", "one", "one/shrunk")],
    ids=["one, then sharded", "one, then two", "sharded, then one"],
)
def test_processes_go_on_where_another_number_has_stopped(runs: Runs, name: str, rank: int | str, output: str) -> None:
    assert "resuming from checkpoint-00000001" in runs.record(name, rank)["lines"]
    weights, gradients = runs.distance("one/full", output)
    assert weights < WEIGHTS and gradients < GRADIENTS
