"""Atomic writes of files and folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write, and move it to `path` on success; an error leaves `path` unchanged.

    Args:
        path: the file or folder.
        shared: several processes may write it at the same time.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    part, aside = path.with_name(f".{path.name}.part"), hidden(path)
    if shared:
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        _remove(part)
        yield part
        _flush(part)
        if path.is_dir():
            _remove(aside)
            path.replace(aside)
        try:
            part.replace(path)
        except OSError:
            if aside.exists():
                aside.replace(path)
            raise
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        _remove(part)
    _remove(aside)


def hidden(path: Path) -> Path:
    """Return the name to which a file or folder is moved before it is deleted."""
    return path.with_name(f".{path.name}.old")


def _flush(path: Path) -> None:
    """Flush a file, or all files of a folder, to disk: some file systems report only then that they are full."""
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())


def _write_error(path: Path, error: Exception) -> CheckpointError:
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{path}: could not be written ({reason}); {shutil.disk_usage(existing).free // 10**6:,} MB are free, what was "
        "there before is kept: make room and run the same command again"
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
