"""Commands in processes of their own, killed by SIGKILL at a chosen moment.

A process is forked from one that has imported mmalign, so that a run costs its own work alone. A moment is the n-th
call of a function of mmalign (also between the batches of an update), the n-th change of the file system under the
run's folder, or a time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mmalign

PACKAGE = str(Path(mmalign.__file__).parent)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KINDS = ("call", "change", "time")


@dataclass(frozen=True)
class Kill:
    """A moment: the n-th event of a kind from 1 on, or so many seconds after the start."""

    kind: str
    number: float


@dataclass(frozen=True)
class Ended:
    """A run that ended by itself: its result, and the number of its events by kind."""

    result: Any
    events: dict[str, float]


def run(command: Callable[[], Any], folder: Path, kill: Kill | None = None) -> Ended | None:
    """Run a command in a process, and kill it at a moment; None if it was killed.

    Args:
        command: a function whose result JSON can hold.
        folder: the folder whose files are watched.
        kill: the moment; None lets the process end.

    Raises:
        AssertionError: the command failed.
    """
    read, write = os.pipe()
    started = time.monotonic()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.close(read)
        _child(command, folder, kill, write)
    os.close(write)
    if kill is not None and kill.kind == "time":
        time.sleep(kill.number)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, text
    record = json.loads(text)
    return Ended(record["result"], {**record["events"], "time": time.monotonic() - started})


def moment(draw: random.Random, kind: str, events: dict[str, float]) -> Kill:
    """Draw a moment of a kind, before the end of a run with these events."""
    if kind == "time":
        return Kill(kind, draw.uniform(0, events["time"]))
    return Kill(kind, draw.randint(1, max(1, int(events[kind]))))


def _child(command: Callable[[], Any], folder: Path, kill: Kill | None, write: int) -> None:
    """Run the command, write its result or its error to a pipe, and end the process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    counts = _watch(folder, kill)
    code, record = 1, ""
    try:
        result = command()
        sys.setprofile(None)
        code, record = 0, json.dumps({"result": result, "events": dict(counts)})
    except BaseException:
        record = traceback.format_exc()
    finally:
        with os.fdopen(write, "w") as pipe:
            pipe.write(record)
        os._exit(code)


def _watch(folder: Path, kill: Kill | None) -> dict[str, int]:
    """Count this process's events from now on, and end it by SIGKILL before the event of the kill."""
    counts, root = {"call": 0, "change": 0}, str(folder)

    def count(kind: str) -> None:
        counts[kind] += 1
        if kill is not None and kill.kind == kind and counts[kind] == kill.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def called(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count("call")

    def changed(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if (opened or event in CHANGES) and str(arguments[0]).startswith(root):
            count("change")

    sys.addaudithook(changed)
    if kill is None or kill.kind == "call":
        sys.setprofile(called)
    return counts
