"""Unfinished work beside the file that a preparation writes, and the end of that work, however it is interrupted."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mmalign.atomic_io import atomic_write, hidden

logger = logging.getLogger(__name__)


def unfinished(path: Path) -> Path:
    """Return the folder that holds the finished pieces of a preparation of `path`."""
    return path.with_name(f"{path.name}.unfinished")


def is_written(path: Path) -> bool:
    """Return whether an earlier call wrote `path` and was stopped before it removed its unfinished work; remove it now.

    Raises:
        ValueError: the file exists, and no such call wrote it.
    """
    record = hidden(path, "written")
    if not path.exists():
        return False
    if not record.is_file() or record.read_bytes() != _digest(path):
        raise ValueError(
            f"data.path: {path} already exists; move it away, or set another with --set data.path=...: prepare never "
            "overwrites"
        )
    discard(path)
    logger.info(f"{path}: already complete")
    return True


def write_final(path: Path, write: Callable[[Path], None]) -> None:
    """Write the file by `write`, atomically, and remove the unfinished work.

    Before the file gets its name, its hash is recorded beside it. After a stop at any moment the next call writes the
    file again or knows it as complete (`is_written`).

    Raises:
        CheckpointError: the disk is full or not writable; the unfinished work stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        write(part)
        with hidden(path, "written").open("wb") as record:
            record.write(_digest(part))
            record.flush()
            os.fsync(record.fileno())
    discard(path)


def discard(path: Path) -> None:
    """Remove the unfinished work, then the record of the file's hash."""
    if unfinished(path).is_dir():
        shutil.rmtree(unfinished(path))
    hidden(path, "written").unlink(missing_ok=True)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()
