"""What a run leaves: files and folders that are whole or not there, and which model was trained from which."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmalign import assemble, checkpoint
from mmalign.families import Family

TRAINED = "trained.json"  # in a trained model's folder


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of `path` once it is whole; an error leaves `path` alone.

    Raises:
        CheckpointError: the disk is full or cannot be written to.
    """
    part, aside = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    _remove(part)
    try:
        yield part
        if path.is_dir():
            _remove(aside)
            path.replace(aside)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from error
    finally:
        _remove(part)
    _remove(aside)


def unwritten(path: Path, error: Exception) -> checkpoint.CheckpointError:
    """What to say when a file or folder could not be written."""
    free = shutil.disk_usage(path.parent).free // 10**6
    return checkpoint.CheckpointError(
        f"{path}: could not be written ({error}); {free:,} MB are free, what was there before is kept: make room and "
        "run the same command again"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_trained(folder: Path) -> dict[str, Any]:
    """The updates (`step`), their `seconds` (see `loop.Progress`) and the `identity` of the model that a run has left.

    Raises:
        ValueError: it has left none.
    """
    try:
        about: dict[str, Any] = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder}: there is no trained model; run `mmalign train` with this recipe first") from None
    return about


def require_base(about: Mapping[str, Any], folder: Path, family: Family) -> None:
    """Refuse to compare a trained model with another base than its own.

    Raises:
        ValueError: the family's weights are not those that the training began with.
    """
    was, now = about["identity"]["model"], assemble.fingerprint(family.network)
    if was != now:
        raise ValueError(
            f"{folder}: was trained from another model than {family.name} (fingerprint {was}; this one has {now}); "
            "name the model that it was trained from, or use another output folder"
        )
