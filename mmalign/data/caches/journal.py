"""Append-only log of a long job's finished pieces, from which an interrupted job resumes.

The first line describes the job. Each further line is one piece of its work, in JSON. An incomplete last line is
discarded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

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
        head = json.loads(json.dumps(job))  # as it reads back from JSON
        lines = self._whole_lines()
        if lines:
            self._require(lines[0], head)
            self.entries = [self._parse(piece, number, line) for number, line in enumerate(lines[1:], start=2)]
        else:
            self._write(head)

    def append(self, piece: Piece) -> None:
        """Append a piece and flush it to disk."""
        self._write(piece)
        self.entries.append(piece)

    def remove(self) -> None:
        """Delete the file; call it once the job's result is written."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """Return the file's complete lines; truncate the file after the last one."""
        try:
            check_file(self.path)
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); move it away to start over") from error
        whole = content[: content.rfind(_END) + 1]
        if len(whole) < len(content) and self._is_writer:
            os.truncate(self.path, len(whole))
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

    def _write(self, content: object) -> None:
        if not self._is_writer:
            return
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + _END
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
