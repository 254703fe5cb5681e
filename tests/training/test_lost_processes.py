"""A training of two real processes joined by gloo, of which one is killed or frozen."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import yaml

from mmalign.training import checkpoint
from tests.helpers import forked, recipes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]  # one server forks them

RANK_TIMEOUT = 5.0  # seconds
SLACK = 20.0  # seconds in which a process ends on a busy machine


@pytest.fixture
def launch(tiny_sd15: Path, tmp_path: Path) -> Iterator[list[ForkServerProcess]]:
    """Start two processes of `mmalign train`, and end them after the test, whatever state they are in."""
    options = {"steps": 10_000, "save_every": 2, "batch_size": 1}
    content = recipes.diffusion_in(tiny_sd15, tmp_path, train=options, limits={"rank_timeout": RANK_TIMEOUT / 60})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        forked.command("train", str(file), log=tmp_path / f"{rank}.log", **address, **environment)
        for rank, environment in enumerate(forked.ranks(2))
    ]
    yield processes
    for process in processes:
        process.kill()  # ends a frozen process as well
        process.join()


@pytest.mark.parametrize(("name", "lost", "seconds"), [("SIGKILL", 1, 0.0), ("SIGSTOP", 0, RANK_TIMEOUT)])
def test_the_other_process_ends_with_a_sentence(
    name: str, lost: int, seconds: float, launch: list[ForkServerProcess], tmp_path: Path
) -> None:
    """At once after a death, and after `limits.rank_timeout` of silence; the sentence names the last checkpoint."""
    log, other = tmp_path / f"{1 - lost}.log", launch[1 - lost]
    forked.wait_for_line(tmp_path / "0.log", "update 3/", launch[0])
    pid = launch[lost].pid
    assert pid is not None
    os.kill(pid, getattr(signal, name))
    started = time.monotonic()
    other.join(seconds + SLACK)
    assert seconds - 1 < time.monotonic() - started and other.exitcode == 1, log.read_text()
    saved = checkpoint.latest(tmp_path / "output", resumable=True)
    assert saved is not None
    (sentence,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert f"process {lost} ended or stopped answering" in sentence
    assert sentence.endswith(f"the same command resumes from {saved.name}")
