"""Atomic checkpoints of a training run, with a limit on their number and a check of their identity.

A checkpoint is a folder `checkpoint-00000100` with three files:

    model.safetensors   the trainable weights
    state.pt            optimizer, average, progress and generator
    checkpoint.json     step, score, the run's identity, and `resting`: true if training can resume from it exactly

A folder whose name begins with a dot is half written or half deleted; the next write deletes it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign.atomic_io import atomic_write, hidden

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint."""

    weights: dict[str, Tensor]
    state: StateDict
    step: int


@dataclass(frozen=True)
class _About:
    """Content of `checkpoint.json`; `resting`: training can resume exactly."""

    step: int
    score: float | None
    resting: bool
    identity: dict[str, str]


def write(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: StateDict,
    identity: Mapping[str, str],
    *,
    keep_checkpoints: int,
    score: float | None = None,
    resumable: bool = True,
) -> Path:
    """Write a checkpoint and delete old ones.

    Three kinds remain: the newest, the last `keep_checkpoints` resumable ones, and the one with the lowest score.

    Args:
        folder: the run's folder.
        step: updates done.
        weights: the trainable weights by name.
        state: everything else, of types that `torch.load(weights_only=True)` reads.
        identity: the model, method and data of the run; `read` compares it.
        keep_checkpoints: number of resumable checkpoints that remain.
        score: a number such as the validation loss, lower is better; None without one.
        resumable: false if training cannot resume from it exactly.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written. Earlier checkpoints stay intact.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    score = score if score is not None and math.isfinite(score) else None
    about = _About(step, score, resumable, dict(identity))
    _sweep(folder)
    with atomic_write(final) as part:
        part.mkdir(parents=True)
        save_file({k: v.detach().contiguous().cpu() for k, v in weights.items()}, part / "model.safetensors")
        try:
            torch.save(state, part / "state.pt")
        except RuntimeError as error:  # torch's own error for a full disk
            raise OSError(str(error)) from error
        (part / "checkpoint.json").write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")
    _prune(folder, keep_checkpoints)
    _sweep(folder)
    return final


def _prune(folder: Path, keep_checkpoints: int) -> None:
    retained = [
        *_all(folder)[-1:],
        *[path for path in _all(folder) if _is_resumable(path)][-keep_checkpoints:],
        best(folder),
    ]
    for path in _all(folder):
        if path not in retained:
            path.replace(hidden(path))  # renamed first: a half-deleted folder must not pass for a checkpoint


def _sweep(folder: Path) -> None:
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path, *, resumable: bool = False) -> Path | None:
    """Return the newest complete checkpoint, or the newest resumable one; None without one."""
    checkpoints = [path for path in _all(folder) if not resumable or _is_resumable(path)]
    return checkpoints[-1] if checkpoints else None


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest score, the first of equal ones; None if none has a score."""
    scored = [(score, path) for path in _all(folder) if (score := _score(path)) is not None]
    return min(scored)[1] if scored else None


def read(path: Path, identity: Mapping[str, str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another model, method or data, or cannot be read.
    """
    try:
        about = _about(path)
    except _DAMAGED as error:
        raise ValueError(_unreadable(path, error)) from error
    differs = [key for key in identity if about.identity.get(key) != identity[key]]
    if differs:
        saved_identity = ", ".join(f"{key} {about.identity.get(key)}" for key in differs)
        current_identity = ", ".join(f"{key} {identity[key]}" for key in differs)
        raise ValueError(
            f"{path}: belongs to another run ({saved_identity}; this one has {current_identity}); use another output "
            "folder, or delete it"
        )
    try:
        weights = load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    # For a damaged file torch alone raises four kinds of error, and safetensors another.
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error
    return Checkpoint(weights, state, about.step)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / "checkpoint.json").is_file())


def _about(path: Path) -> _About:
    content = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    return _About(int(content["step"]), content.get("score"), content.get("resting", True), dict(content["identity"]))


_DAMAGED = (OSError, ValueError, KeyError, TypeError)  # raised by `_about`


def _is_resumable(path: Path) -> bool:
    """Return whether training can resume from a checkpoint; True for a damaged file, which `read` refuses."""
    try:
        return _about(path).resting
    except _DAMAGED:
        return True


def _score(path: Path) -> float | None:
    """Return a checkpoint's score; None also for a damaged file, which must not stop a run from saving."""
    try:
        return _about(path).score
    except _DAMAGED:
        return None


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: is damaged and cannot be read ({_first_line(error)}); delete it to go on from the one before"


def _first_line(error: Exception) -> str:
    """Return the type and first line of an error, since torch's messages fill a page; at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": ")
