"""A trial: the commands of a case in turn, killed and continued, with what they leave compared to that of no kill."""

from __future__ import annotations

import hashlib
import importlib
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import Trained
from tests.fault_injection.cases import Case, Content
from tests.fault_injection.killing import KINDS, Kill, moment, run

CACHE = "cache"  # its shards have random names, and other rows after a kill
DURATIONS = {"seconds", "contrast_seconds"}  # in state.pt
SECONDS = re.compile(rb'"seconds": [0-9.e-]+')
MORE_KILLS = 0.5  # probability that a continued command is killed again
WEIGHT = {"train": 3}  # of a command among those that a kill is drawn from


@dataclass(frozen=True)
class Step:
    """A command that was never stopped: what lies there before it, what it leaves, and its result and events."""

    before: Path
    files: dict[str, str]
    result: Any
    events: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """The kills of a trial as (command, moment), and the names of what differs."""

    kills: list[tuple[str, Kill]]
    differs: list[str]


def whole(case: Case, models: Path, folder: Path) -> dict[str, Step]:
    """Run a case's commands without a kill; return the steps by command. Copies of the folder lie beside it."""
    content, steps, kept = case.content(models, folder), dict[str, Step](), Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in case.commands:
        shutil.copytree(folder, kept / command)
        ended = run(partial(_call, command, content), folder)
        assert ended is not None
        steps[command] = Step(kept / command, state(folder), ended.result, ended.events)
    return steps


def trial(case: Case, models: Path, folder: Path, steps: dict[str, Step], draw: random.Random) -> Trial:
    """Kill one of a case's commands at one random moment or several, continue it, and compare."""
    target = draw.choices(case.commands, [WEIGHT.get(command, 1) for command in case.commands])[0]
    kills = [moment(draw, draw.choice(KINDS), steps[target].events)]
    while draw.random() < MORE_KILLS:
        kills.append(moment(draw, draw.choice(KINDS), steps[target].events))
    return killed(case, models, folder, steps, target, kills)


def killed(case: Case, models: Path, folder: Path, steps: dict[str, Step], target: str, kills: Sequence[Kill]) -> Trial:
    """Kill a command at the given moments, each after the same command was started again, and compare.

    What a killed `cache` leaves is compared by the training that reads it.
    """
    content, done, differs = case.content(models, folder), list[tuple[str, Kill]](), list[str]()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(steps[target].before, folder)
    for command in ("cache", "train") if target == "cache" else (target,):
        for kill in [*kills, None] if command == target else [None]:
            ended = run(partial(_call, command, content), folder, kill)
            if ended is not None:
                if ended.result != steps[command].result:
                    differs.append(f"result of {command}: {ended.result} for {steps[command].result}")
                break
            assert kill is not None
            done.append((command, kill))
            if command == "prepare" and state(folder) == steps[command].files:
                break  # killed after its last change: it never writes a file again
    left, expected = state(folder), steps[command].files
    differs += sorted(file for file in {*left, *expected} if left.get(file) != expected.get(file))
    return Trial(done, differs)


def _call(command: str, content: Content) -> Any:
    """Run a command in this process; of a training return the logged means and the verdict."""
    torch.set_num_threads(1)
    result = getattr(importlib.import_module(f"mmalign.commands.{command}"), command)(load_recipe(content))
    return {"history": result.history, "verdict": result.verdict} if isinstance(result, Trained) else None


def state(folder: Path) -> dict[str, str]:
    """Return a hash of each file under a folder; of a file of PyTorch, of the numbers in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and CACHE not in path.parts]
    return {str(path.relative_to(folder)): _digest(path) for path in files if not path.name.endswith("mmalign-lock")}


def _digest(path: Path) -> str:
    digest = hashlib.blake2b()
    if path.suffix == ".pt":
        _add(digest, torch.load(path, weights_only=True))
    else:
        text = path.read_bytes()
        if path.name == "checkpoint.json":  # the hash of state.pt, in which the duration is
            text = re.sub(rb'"state.pt": "[0-9a-f]+"', b"", text)
        digest.update(SECONDS.sub(b"", text) if path.suffix == ".json" else text)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a tree of tensors and plain values to a hash, but for durations."""
    if isinstance(value, dict):
        for key in sorted(value.keys() - DURATIONS, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    else:
        digest.update(repr(value).encode())
