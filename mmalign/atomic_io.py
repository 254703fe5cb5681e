"""Atomic writes of files and folders, and the lock of a folder that one process writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

LOCK = ".mmalign-lock"
_held: set[Path] = set()  # locks of this process


@contextlib.contextmanager
def atomic_write(path: Path, *, marker: str = "", shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write, and move it to `path` on success; an error leaves `path` unchanged.

    New files get the permissions that the user's umask gives.

    Args:
        path: a file, or a folder.
        marker: for a folder, the name of a file that it always has; an existing folder without it is not replaced.
        shared: several processes may write it at the same time.

    Raises:
        ValueError: `path` is a folder that mmalign did not write.
        CheckpointError: the disk is full or not writable.
    """
    check_owned(path, marker)
    part, aside = hidden(path, f"{uuid.uuid4().hex}-part" if shared else "part"), hidden(path, "old")
    try:
        # Writers hold the folder together, and `remove_unfinished` would hold it alone
        with _system_lock(path.parent, fcntl.LOCK_SH) if shared else contextlib.nullcontext():
            _remove(part)
            yield part
            _apply_umask(part)
            _flush(part)
            _replace(part, path, aside)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        _remove(part)
    # The old folder goes once the new one is in its place
    _remove(aside)


def write_json(path: Path, content: object) -> None:
    """Write content as JSON, in one step.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    with atomic_write(path) as part:
        # Half of a character, as a user's text may have, is no UTF-8
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


def _replace(part: Path, path: Path, aside: Path) -> None:
    """Move `part` to `path`; an existing folder goes to `aside`, and back if that fails."""
    if path.is_dir():
        _remove(aside)
        path.replace(aside)
    try:
        part.replace(path)
    except OSError:
        if aside.exists():
            aside.replace(path)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of shared writes to a folder, unless another process writes there now."""
    with _system_lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
        for part in folder.glob(".*.mmalign-*-part") if is_alone else ():
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _system_lock(folder: Path, kind: int) -> Iterator[bool]:
    """Hold the system's lock on a folder itself; yield False if another process or the file system refuses it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, kind)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def hidden(path: Path, kind: str) -> Path:
    """Return the name of a temporary neighbour of a file or folder."""
    return path.with_name(f".{path.name}.mmalign-{kind}")


def check_owned(path: Path, marker: str) -> None:
    """Refuse a folder with files that mmalign did not write; a link to a folder is replaced, not what it names.

    Args:
        path: the folder to replace, if it exists.
        marker: the name of a file that a folder of mmalign always has.

    Raises:
        ValueError: the folder has files, and `marker` is not among them.
    """
    if path.is_symlink() or not path.is_dir() or (marker and (path / marker).is_file()):
        return
    first = next(iter(sorted(path.iterdir())), None)
    if first is not None:
        raise ValueError(
            f"{path}: is a folder that mmalign did not write (it has {first.name}, and no {marker or 'file of its own'}"
            "); move it away, or name another output"
        )


def _apply_umask(path: Path) -> None:
    """Give a file, or all files of a folder, the permissions of the user's umask; safetensors writes them as 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        file.chmod((file.stat().st_mode | 0o666) & ~mask)


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
        f"{path}: could not be written ({reason}); {shutil.disk_usage(existing).free // 10**6:,} MB are free, earlier "
        "files are unchanged; free some space and run the same command again"
    )


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, in the main process of a launch; the same process may hold it several times.

    The system frees the lock when a process ends, however it ends.

    Raises:
        ValueError: another process holds the lock.
    """
    with _lock(folder, folder / LOCK):
        yield


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is written once, as `folder_lock` does; the lock's own file is removed at the end.

    Raises:
        ValueError: another process holds the lock.
    """
    lock = hidden(path, "lock")
    with _lock(path, lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(target: Path, lock: Path) -> Iterator[None]:
    resolved = lock.resolve()
    # Nested, or a process beside the one that writes
    if resolved in _held or os.environ.get("RANK", "0") != "0":
        yield
        return
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{target}: another mmalign ({file.read().strip() or 'just started'}) is writing here; wait until it "
                "has ended, or name another output"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning(f"{target}: cannot be locked ({error.strerror}); start no second command on it")
        # Its last owner may have deleted the file after this process opened it: then nobody else sees this lock
        if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise ValueError(f"{target}: another mmalign has just ended its work here; run the command again")
        # The owner, for the message to others
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(resolved)
        try:
            yield
        finally:
            _held.discard(resolved)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class CheckpointError(RuntimeError):
    """Failure to write a checkpoint; earlier checkpoints are intact."""


def prepare_file(option: str, file: Path | None) -> None:
    """Create the folder of the file that a command will write for `option`; None is no file.

    Commands call it before they begin, so that their work is not lost for a wrong path.

    Raises:
        ValueError: the file is a folder, or its folder is not writable.
    """
    if file is not None:
        make_folder(option, file.parent)
        if file.is_dir():
            raise ValueError(f"{option}: {file} is a folder; name a file")


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
        raise ValueError(f"{key}: {folder} is not writable ({error.strerror}); choose a writable folder") from error
    return folder
