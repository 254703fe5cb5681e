"""Rows of a source, whatever the kind of its files."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from mmalign.data.formats.files import Record
from mmalign.data.pairs import SkippedRow


class SourceRow(NamedTuple):
    """Row of a source.

    Attributes:
        location: its position, for messages: "pairs.jsonl: line 17".
        record: its values by column; images are paths, data URIs or `StoredImage`.
        folders: the folders in which to search for its image paths.
    """

    location: str
    record: Record
    folders: tuple[Path, ...]


class Rows(Protocol):
    """Interface of a source's rows."""

    def __len__(self) -> int:
        """Return the number of rows, with those that cannot be read."""

    def __iter__(self) -> Iterator[SourceRow | SkippedRow]:
        """Yield the rows, and the reasons for those that cannot be read."""

    def row(self, number: int) -> SourceRow:
        """Return the row of that number, in the order of iteration."""


def uncollected(rows: Rows) -> Iterator[SourceRow | SkippedRow]:
    """Yield rows while the collector of reference cycles pauses, which visits all objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield from rows
    finally:
        if was_enabled:
            gc.enable()


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: list[SourceRow | SkippedRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[SourceRow | SkippedRow]:
        return iter(self._rows)

    def row(self, number: int) -> SourceRow:
        """Return the row of that number."""
        row = self._rows[number]
        assert isinstance(row, SourceRow), "an indexed row can be read"
        return row
