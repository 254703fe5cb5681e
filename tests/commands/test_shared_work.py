"""Preparation and evaluation on two processes of this machine's CPU: the bytes that one process writes."""

import json
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmalign.commands import bench, evaluate, plan, prepare, train
from mmalign.commands.load_recipe import load_recipe
from mmalign.training import launch as launch_module
from mmalign.training import processes as processes_module
from mmalign.training.processes import Processes, connect_processes, current_processes
from tests.helpers import Folders, data_files, forked, recipes

Content = dict[str, Any]


def launch(folder: Path, command: str, content: Content) -> None:
    """Run a command in two processes, joined by gloo."""
    recipe = folder / f"{command}.json"
    recipe.write_text(json.dumps(content))  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"{command}-{rank}.log" for rank in range(2)]
    processes = [
        forked.command(command, str(recipe), log=log, **rank, **place)
        for log, rank in zip(logs, forked.ranks(2), strict=True)
    ]
    for process in processes:
        process.join(300)
    texts = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(texts)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder, by name."""
    files = [path for path in sorted(folder.rglob("*.*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_one_process_has_all_the_work() -> None:
    alone = connect_processes(1.0)
    assert alone == current_processes() == Processes(0, 1) and alone.is_main
    assert all(alone.is_mine(index) for index in range(3))
    assert alone.gather("a") == ["a"] and alone.on_main(lambda: 3) == 3


def test_pieces_are_dealt_out_once() -> None:
    shares = [[index for index in range(7) if Processes(rank, 3).is_mine(index)] for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("command", [evaluate.evaluate, prepare.prepare, bench.bench, partial(plan.plan, probe=True)])
def test_a_process_waits_as_long_as_the_recipe_says(
    command: Callable[[Any], object], tiny_sd15: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = list[object]()

    def connect(rank_timeout: float | None = None, **_: object) -> None:
        minutes.append(rank_timeout)
        raise ValueError("connected")

    for module in (launch_module, processes_module):
        monkeypatch.setattr(module, "connect", connect)
    content = recipes.diffusion_in(tiny_sd15, tmp_path, limits={"rank_timeout": 7.0})
    content["evaluate"] = {"benchmark": "scenes", "prompts": 2}
    content["prepare"] = {"prompts": 2, "reward": {"path": str(tiny_clip)}}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="connected"):
        command(load_recipe(content) if command is not bench.bench else content)
    assert minutes == [7.0]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # one server forks them
def test_two_processes_prepare_and_evaluate_as_one(vlm_folders: Folders, tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path / "rows", layout="trl")
    section = {"kind": "judged", "keep_torn": True, "save_every": 2, "source": {"format": "trl", "path": str(rows)}}
    judge = {"name": "vlm", "path": str(vlm_folders("llava")), "options": {"batch_size": 3}}
    section["judged"] = {"reward": judge, "max_new_tokens": 4, "batch_size": 3, "min_confidence": 0.5}
    made = {name: tmp_path / "rows" / f"{name}.jsonl" for name in ("one", "two")}
    model = vlm_folders("llava")
    content = {name: recipes.vlm(model, path, tmp_path / name, prepare=section) for name, path in made.items()}
    prepare.prepare(load_recipe(content["one"]))
    launch(tmp_path, "prepare", content["two"])
    assert made["two"].read_bytes() == made["one"].read_bytes() and not list(made["two"].parent.glob("*unfinished*"))
    # The same trained model, evaluated by one and by two processes
    asked = {"benchmark": "crowds", "num_images": 3, "decoding": {"max_new_tokens": 4, "batch_size": 3}}
    run = {**recipes.vlm(model, rows, tmp_path / "run", train={"steps": 2, "lr": 0.1}), "evaluate": asked}
    train.train(load_recipe(run))
    shutil.copytree(tmp_path / "run", tmp_path / "run2")
    evaluate.evaluate(load_recipe(run))
    launch(tmp_path, "evaluate", {**run, "output": str(tmp_path / "run2")})
    for folder in ("answers", "evaluation"):
        assert contents(tmp_path / "run2" / folder) == contents(tmp_path / "run" / folder)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # one server forks them
def test_two_processes_generate_images_as_one(tiny_sd15: Path, tmp_path: Path) -> None:
    section = {
        "prompts": 3,
        "images_per_prompt": 2,
        "min_confidence": 0.5,
        "reward": {"path": "models/tiny_clip"},
        "sampling": {"steps": 1, "guidance": 1.0, "batch_size": 2},
    }
    made = [tmp_path / f"{name}.parquet" for name in ("one", "two")]
    single, two = (recipes.diffusion(tiny_sd15, path, tmp_path / "out", prepare=section) for path in made)
    prepare.prepare(load_recipe(single))
    launch(tmp_path, "prepare", two)
    assert made[1].read_bytes() == made[0].read_bytes() and not list(tmp_path.glob("*unfinished*"))
    # The same trained model, evaluated by one and by two processes
    asked = {**section, "benchmark": "preference", "sampling": {"steps": 1, "guidance": 1.0, "batch_size": 2}}
    asked.pop("min_confidence")
    run = recipes.diffusion(tiny_sd15, made[0], tmp_path / "run", train={"steps": 1}, evaluate=asked)
    train.train(load_recipe(run))
    shutil.copytree(tmp_path / "run", tmp_path / "run2")
    evaluate.evaluate(load_recipe(run))
    launch(tmp_path, "evaluate", {**run, "output": str(tmp_path / "run2")})
    assert contents(tmp_path / "run2" / "evaluation") == contents(tmp_path / "run" / "evaluation")
