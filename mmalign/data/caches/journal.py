"""Append-only log of a long job's finished pieces, from which an interrupted job resumes.

The first line describes the job. Each further line is one piece of its work, in JSON. An incomplete last line is
discarded. Several processes may append to one file: each locks it while it reads or writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Generic, Literal, TypeVar

from mmalign.reading import check_file, parse_as

_END = b"\n"


Piece = TypeVar("Piece")


class AppendLog(Generic[Piece]):
    """Log file of a job's finished pieces.

    Attributes:
        path: the file.
        entries: the pieces appended so far, in order.

    Args:
        path: the file; created if it does not exist.
        job: everything that the work depends on; JSON.
        piece: the shape of a piece, which pydantic validates.
        is_writer: false in all processes of a launch but one; they read the file and keep new pieces in memory.

    Raises:
        ValueError: the file belongs to another job, with the differences, or a line is damaged.
    """

    def __init__(self, path: Path, job: Mapping[str, object], piece: type[Piece], *, is_writer: bool = True) -> None:
        self.path, self.entries, self._is_writer = path, list[Piece](), is_writer
        self._size = 0  # bytes of the file that this log has read or written
        head = json.loads(json.dumps(job))  # as it reads back from JSON
        lines = self._whole_lines()
        if lines:
            self._require(lines[0], head)
            self.entries = [self._parse(piece, number, line) for number, line in enumerate(lines[1:], start=2)]
        else:
            self._write(head, is_first=True)

    def append(self, piece: Piece) -> None:
        """Append a piece and flush it to disk."""
        self._write(piece)
        self.entries.append(piece)

    @property
    def is_outdated(self) -> bool:
        """True if another process has written to the file since, or removed it."""
        return not self.path.exists() or self.path.stat().st_size != self._size

    def remove(self) -> None:
        """Delete the file; call it once the job's result is written."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """Return the file's complete lines; truncate the file after the last one."""
        try:
            check_file(self.path)
            with _locked(self.path, "rb", fcntl.LOCK_SH) as file:
                content = file.read()
                # A killed process leaves half a line, after which nothing may be appended
                whole = content[: content.rfind(_END) + 1]
                if len(whole) < len(content) and self._is_writer:
                    os.truncate(self.path, len(whole))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); move it away to start over") from error
        self._size = len(whole)
        return whole.split(_END)[:-1]

    def _parse(self, kind: type[Piece], number: int, line: bytes) -> Piece:
        try:
            return parse_as(kind, line)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: line {number} is damaged ({error}); delete it and the lines after it to resume from "
                "there, or move the file away to start over"
            ) from error

    def _require(self, line: bytes, job: Mapping[str, object]) -> None:
        try:
            began = parse_as(dict[str, object], line)
        except ValueError:
            raise ValueError(f"{self.path}: is not a record of unfinished work; move it away") from None
        other = sorted(key for key in {*began, *job} if began.get(key) != job.get(key))
        if other:
            was, now = (_short(some.get(other[0])) for some in (began, job))
            raise ValueError(
                f"{self.path}: was started with other settings ({', '.join(other)} differ; {other[0]} was {was} and is "
                f"{now}); use the same settings to resume, or move that file away to start over"
            )

    def _write(self, content: object, *, is_first: bool = False) -> None:
        """Append a line; a first line only to an empty file, since another process may have begun it."""
        if not self._is_writer:
            return
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + _END
        with _locked(self.path, "ab", fcntl.LOCK_EX) as file:
            before = os.fstat(file.fileno()).st_size
            if is_first and before:
                return
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            # Lines of others in between are unread
            if before == self._size:
                self._size += len(line)


@contextlib.contextmanager
def _locked(path: Path, mode: Literal["rb", "ab"], kind: int) -> Iterator[BinaryIO]:
    """Open a file and wait for the system's lock of it, which closing releases."""
    with path.open(mode) as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, kind)
        yield file


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
