"""Commands in processes of their own, which are forked from a server that has imported the heavy libraries.

A process of `subprocess` imports them anew, which takes ten seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def preload() -> None:
    """Let the server import the libraries; it starts with the first process of this one."""
    CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])


def start(work: Callable[..., int | None], *arguments: Any, log: Path, **environment: str) -> ForkServerProcess:
    """Start a function in a process with further environment variables.

    Args:
        work: a function of a module that the process can import; it returns the exit code, or None for 0.
        arguments: its arguments.
        log: the file of its output.
        environment: the variables.
    """
    preload()
    process = CONTEXT.Process(target=_run, args=(work, arguments, log, environment))
    process.start()
    return process


def command(*words: str, log: Path, **environment: str) -> ForkServerProcess:
    """Start a command of mmalign."""
    return start(_command, words, log=log, **environment)


def ranks(number: int) -> list[dict[str, str]]:
    """Return the variables that a launcher gives to each process of a launch on this machine's CPU."""
    size = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return [{**size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def wait_for_line(log: Path, beginning: str, process: ForkServerProcess, seconds: float = 120) -> None:
    """Wait until a process has written a line that begins so.

    Raises:
        AssertionError: the process ended, or took too long.
    """
    end, text = time.monotonic() + seconds, ""
    while f"\n{beginning}" not in f"\n{text}":
        assert process.is_alive() and time.monotonic() < end, text
        time.sleep(0.05)
        text = log.read_text() if log.exists() else ""


def _run(work: Callable[..., int | None], arguments: Sequence[Any], log: Path, environment: Mapping[str, str]) -> None:
    os.environ.update({**ALONE, **environment})
    with log.open("wb", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    sys.exit(work(*arguments))


def _command(words: Sequence[str]) -> None:
    from mmalign.cli import main

    sys.argv = ["mmalign", *words]
    main()
