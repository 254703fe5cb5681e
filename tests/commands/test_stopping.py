"""Signals, time limits and locks of a training run."""

import errno
import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from mmalign import atomic_io
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.training.stopping import TIME_LIMIT_CODE, StopRequest, TrainingStopped
from tests.helpers import data_files, forked, recipes
from tests.helpers.runs import assert_same, train_weights

pytestmark = pytest.mark.xdist_group("processes")  # one server forks them

Content = dict[str, Any]
UPDATES = 400  # more than a run makes before it is stopped


@pytest.fixture
def content(tiny_sd15: Path, tmp_path: Path) -> Content:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    return recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"save_every": 1000})


def start(content: Content, folder: Path) -> ForkServerProcess:
    """Start `mmalign train` in its own process, and wait until it has made an update."""
    file, log = folder / "recipe.yaml", folder / "log"
    file.write_text(yaml.dump({**content, "train": {**content["train"], "steps": UPDATES}}))
    process = forked.command("train", str(file), log=log)
    forked.wait_for_line(log, "update 2/", process)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_says_how_to_resume(name: str, content: Content, tmp_path: Path) -> None:
    process, number = start(content, tmp_path), getattr(signal, name)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=120)
    err = (tmp_path / "log").read_text()
    assert process.exitcode == 128 + number, err
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(folder.name.removeprefix("checkpoint-"))
    assert f"stopped after update {step} ({name}); the same command resumes from {folder.name}" in err
    resumed = train_weights(content, f"train.steps={step + 1}")
    whole = train_weights({**content, "output": str(tmp_path / "whole")}, f"train.steps={step + 1}")
    assert_same(resumed, whole)


@pytest.mark.slow
def test_second_command_on_a_folder_is_refused(content: Content, tmp_path: Path) -> None:
    process = start(content, tmp_path)
    try:
        with pytest.raises(ValueError, match=f"another mmalign .process {process.pid} on .* is writing here"):
            train(load_recipe(content))
    finally:
        process.kill()
        process.join()
    assert train(load_recipe(content)).steps == 4  # the lock of a dead process is taken over


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handling of SIGINT, also where a shell's background job ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interrupts")
def test_second_interrupt_stops_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_during_a_log_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A stream that is being written to cannot be written to by the handler as well."""
    lines = []

    class Interrupted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            signal.raise_signal(getattr(signal, name))

    root, handler = logging.getLogger("mmalign"), Interrupted()
    root.addHandler(handler)
    try:
        with StopRequest():
            root.error("update 1/4")
    finally:
        root.removeHandler(handler)
    assert lines == ["update 1/4"]
    assert f"{name}: saving after this update" in capfd.readouterr().err


@pytest.mark.usefixtures("interrupts")
def test_ignored_signals_stay_ignored() -> None:
    """A background job of a shell ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signal is None


@pytest.mark.slow
def test_time_limit_saves_and_stops(content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, closed = [0.0], list[Accelerator]()

    def clock() -> float:
        now[0] += 60.0
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr("mmalign.training.stopping.time", SimpleNamespace(monotonic=clock))
        patch.setattr(Accelerator, "end_training", lambda self: closed.append(self))
        with pytest.raises(TrainingStopped, match=r"after update 2 \(limits.hours: 0.03 reached\)") as raised:
            train(load_recipe(content, ["limits.hours=0.03"]))
    assert raised.value.code == TIME_LIMIT_CODE
    assert len(closed) == 1  # trackers know that the run has ended
    whole = train_weights({**content, "output": str(tmp_path / "whole")})
    assert_same(train_weights(content), whole)
    assert load_file(tmp_path / "out" / "checkpoint-00000002" / "model.safetensors")


def is_locked(folder: Path) -> bool:
    """Return whether another process could not lock the folder."""
    with (folder / atomic_io.LOCK).open("a+") as file:  # another open file has a lock of its own
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_lock_held_twice_is_freed_with_the_outer_one(tmp_path: Path) -> None:
    with atomic_io.folder_lock(tmp_path):
        with atomic_io.folder_lock(tmp_path):
            assert is_locked(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mmalign.atomic_io.fcntl.flock", refuse)
    with atomic_io.folder_lock(tmp_path):
        pass
    assert log_lines == [f"{tmp_path}: cannot be locked (No locks available); start no second command on it"]


def test_spo_stops_after_the_last_update_of_a_batch(
    tiny_sd15: Path, tiny_step_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is four updates here, and a run resumes only between batches."""
    reward = {"name": "step_aware", "path": str(tiny_step_judge)}
    method = {"name": "spo", "steps": 6, "start": 2, "threshold": 0.0, "reward": reward}
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", method=method, train={"steps": 8})
    clock = SimpleNamespace(monotonic=iter(float(n) for n in range(10**6)).__next__)
    monkeypatch.setattr("mmalign.training.stopping.time", clock)
    with pytest.raises(TrainingStopped, match="after update 4 "):
        train(load_recipe(content, ["limits.hours=0.0001"]))
