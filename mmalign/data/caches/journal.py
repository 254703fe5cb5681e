"""Append-only log of a long job's finished pieces, from which an interrupted job resumes.

The first line describes the job. Each further line is one piece of its work, in JSON. An incomplete last line is
discarded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_END = b"\n"


class AppendLog:
    """Log file of a job's finished pieces.

    Attributes:
        path: the file.
        entries: the pieces appended so far, in order.

    Args:
        path: the file; created if it does not exist.
        job: everything that the work depends on; JSON.

    Raises:
        ValueError: the file belongs to another job; the message names the differences.
    """

    def __init__(self, path: Path, job: Mapping[str, object]) -> None:
        self.path, self.entries = path, list[Any]()
        head = json.loads(json.dumps(job))  # as it reads back from JSON
        lines = self._whole_lines()
        if lines:
            self._require(lines[0], head)
            self.entries = [json.loads(line) for line in lines[1:]]
        else:
            self._write(head)

    def append(self, piece: object) -> None:
        """Append a piece and flush it to disk."""
        self._write(piece)
        self.entries.append(piece)

    def remove(self) -> None:
        """Delete the file; call it once the job's result is written."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """Return the file's complete lines; truncate the file after the last one."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(_END) + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return whole.splitlines()

    def _require(self, line: bytes, job: Mapping[str, object]) -> None:
        try:
            began = json.loads(line)
        except ValueError:
            began = None
        if not isinstance(began, dict):
            raise ValueError(f"{self.path}: is not a record of unfinished work; move it away")
        other = sorted(key for key in {*began, *job} if began.get(key) != job.get(key))
        if other:
            was, now = (_short(some.get(other[0])) for some in (began, job))
            raise ValueError(
                f"{self.path}: was started with other settings ({', '.join(other)} differ; {other[0]} was {was} and is "
                f"{now}); use the same settings to resume, or move that file away to start over"
            )

    def _write(self, content: object) -> None:
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + _END
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
