"""Atomic writes of files and folders."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write, and move it to `path` on success; an error leaves `path` unchanged.

    Raises:
        CheckpointError: the disk is full or not writable.
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
        raise write_error(path, error) from error
    finally:
        _remove(part)
    _remove(aside)


def write_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file or folder that could not be written."""
    free = shutil.disk_usage(path.parent).free // 10**6
    return CheckpointError(
        f"{path}: could not be written ({error}); {free:,} MB are free, what was there before is kept: make room and "
        "run the same command again"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class CheckpointError(RuntimeError):
    """Failure to write a checkpoint; earlier checkpoints are intact."""


def make_folder(key: str, folder: Path) -> Path:
    """Create the folder that the recipe names at `key` if it is missing, and return it.

    Raises:
        ValueError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{key}: {folder} cannot be written to ({error.strerror}); name a folder in which you may write"
        ) from error
    return folder
