"""Atomic checkpoints of a training run, with a limit on their number and a check of their identity.

A checkpoint is a folder `checkpoint-00000100` with three files:

    model.safetensors   the trainable weights
    state.pt            optimizer, average, progress and generator
    checkpoint.json     step, score, identity and record of the run, `resting`: true if training can resume from it
                        exactly, and a hash of each of the other files

A hidden folder is half written or half deleted; the next write deletes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign.atomic_io import atomic_write, hidden
from mmalign.reading import check_file, error_line, parse_as
from mmalign.training.record import Record

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

_PREFIX = "checkpoint-"
_ABOUT, _WEIGHTS, _STATE = "checkpoint.json", "model.safetensors", "state.pt"
_HASHED = (_WEIGHTS, _STATE)
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_HIDDEN = re.compile(rf"\.{_PREFIX}\d{{8}}\.mmalign-(part|old)")


class DamagedCheckpointError(ValueError):
    """Checkpoint whose files do not hold what was written; earlier ones may be intact."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint; `resting`: training can resume from it exactly; `identity`: of its run."""

    weights: dict[str, Tensor]
    state: StateDict
    step: int
    resting: bool
    record: Record
    identity: dict[str, str]


@dataclass(frozen=True)
class _About:
    """Content of `checkpoint.json`; `resting`: training can resume exactly; `hashes`: of the other files, by name."""

    step: Annotated[int, Field(ge=0)]
    score: Annotated[float, Field(allow_inf_nan=False)] | None
    resting: bool
    identity: dict[str, str]
    record: Record
    hashes: dict[str, str]


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
    record: Record | None = None,
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
        record: the run's recipe and its changes.

    Raises:
        ValueError: a folder of the checkpoint's name is not a checkpoint.
        CheckpointError: the disk is full or the folder cannot be written. Earlier checkpoints stay intact.
    """
    final = folder / name(step)
    # A diverged run has a score that `_About` would refuse to read
    score = score if score is not None and math.isfinite(score) else None
    # What killed processes left behind gives its space to the new checkpoint
    _sweep(folder)
    with atomic_write(final, marker=_ABOUT) as part:
        part.mkdir(parents=True)
        save_file({k: v.detach().contiguous().cpu() for k, v in weights.items()}, part / _WEIGHTS)
        try:
            torch.save(state, part / _STATE)
        except RuntimeError as error:  # torch's own error for a full disk
            raise OSError(str(error)) from error
        # Hashes of the files as written, by which `read` recognizes damage
        hashes = {path.name: _hash(path) for path in sorted(part.iterdir())}
        about = _About(step, score, resumable, dict(identity), record or Record(), hashes)
        (part / _ABOUT).write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")
    # Old ones go once the new one is complete: `_prune` hides them, `_sweep` deletes what is hidden
    _prune(folder, keep_checkpoints)
    _sweep(folder)
    return final


def name(step: int) -> str:
    """Return the name of the checkpoint after update `step`."""
    return f"{_PREFIX}{step:08d}"


def _prune(folder: Path, keep_checkpoints: int) -> None:
    retained = [
        *complete(folder)[-1:],
        *[path for path in complete(folder) if _is_resumable(path)][-keep_checkpoints:],
        best(folder),
    ]
    for path in complete(folder):
        if path not in retained:
            path.replace(hidden(path, "old"))  # renamed first: a half-deleted folder must not pass for a checkpoint


def _sweep(folder: Path) -> None:
    for path in folder.glob(f".{_PREFIX}*"):
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _hash(path: Path) -> str:
    """Return the hash of a file's content."""
    check_file(path, None)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def latest(folder: Path, *, resumable: bool = False) -> Path | None:
    """Return the newest complete checkpoint, or the newest resumable one; None without one."""
    checkpoints = [path for path in complete(folder) if not resumable or _is_resumable(path)]
    return checkpoints[-1] if checkpoints else None


def complete(folder: Path) -> list[Path]:
    """Return all complete checkpoints, the oldest first; a copy with a name of its own is the user's."""
    paths = (path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name))
    return sorted(path for path in paths if (path / _ABOUT).is_file())


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest score, the first of equal ones; None if none has a score."""
    abouts = [(about.score, path) for path in complete(folder) if (about := _about_if_intact(path)) is not None]
    scored = [(score, path) for score, path in abouts if score is not None]
    return min(scored)[1] if scored else None


def read(path: Path, identity: Mapping[str, str] | None) -> Checkpoint:
    """Read a checkpoint of the run of that identity, or of any run without one, and check its files' hashes.

    Raises:
        DamagedCheckpointError: a file does not hold what was written, or its weights are not finite.
        ValueError: the checkpoint belongs to another run, or the system cannot read it now.
    """
    # Its description: missing or broken is damage, while a failing disk may work again
    try:
        about = _about(path)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: is damaged ({_ABOUT} is missing)") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{path}: is damaged ({_ABOUT}: {error})") from error
    # Keys of both identities, since one may be new or gone
    identity = about.identity if identity is None else identity
    differs = [key for key in {**about.identity, **identity} if about.identity.get(key) != identity.get(key)]
    if differs:
        saved_identity = ", ".join(f"{key} {about.identity.get(key, 'none')}" for key in differs)
        current_identity = ", ".join(f"{key} {identity.get(key, 'none')}" for key in differs)
        raise ValueError(
            f"{path}: belongs to another run ({saved_identity}; this one has {current_identity}); use another output "
            "folder, or the settings of that run"
        )
    # Its tensors, after the hashes of both files
    try:
        for name in _HASHED:
            if _hash(path / name) != about.hashes.get(name):
                raise DamagedCheckpointError(f"{path}: is damaged ({name} does not have the hash that was written)")
        weights = load_file(path / _WEIGHTS)
        state = torch.load(path / _STATE, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: is damaged ({Path(error.filename or path).name} is missing)") from error
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error
    except DamagedCheckpointError:
        raise
    # For a damaged file torch alone raises four kinds of error, and safetensors another.
    except Exception as error:
        raise DamagedCheckpointError(f"{path}: is damaged ({error_line(error)})") from error
    # Hashes prove what was written, not that it was finite
    broken = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise DamagedCheckpointError(f"{path}: is damaged ({broken} is not finite)")
    return Checkpoint(weights, state, about.step, about.resting, about.record, about.identity)


def _about(path: Path) -> _About:
    """Read `checkpoint.json`.

    Raises:
        OSError: the file is missing, or cannot be read now.
        ValueError: it is damaged, or another checkpoint's.
    """
    check_file(path / _ABOUT)
    about = parse_as(_About, (path / _ABOUT).read_bytes())
    if path.name != name(about.step):
        raise ValueError(f"it is of update {about.step}")
    return about


def _is_resumable(path: Path) -> bool:
    """Return whether training can resume from a checkpoint; True for a damaged file, which `read` refuses."""
    about = _about_if_intact(path)
    return about is None or about.resting


def _about_if_intact(path: Path) -> _About | None:
    """Read `checkpoint.json`; None for a damaged file, which must not stop a run from saving."""
    try:
        return _about(path)
    except (OSError, ValueError):
        return None


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error for a checkpoint that the system cannot read now, which says nothing about its content."""
    return ValueError(
        f"{path}: cannot be read now ({error_line(error)}); the checkpoint may be sound: look at its permissions, the "
        "disk and the memory, and run the same command again"
    )
