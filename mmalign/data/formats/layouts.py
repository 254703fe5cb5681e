"""Layouts of preference data: the columns of a format, and their names in the files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from mmalign.data.formats.files import TABLES, Record, find_files, is_hub_path, read_schema, records
from mmalign.data.pairs import Defect
from mmalign.registry import check_known

Row = TypeVar("Row")


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """Columns of a format, by the format's own names.

    Attributes:
        name: the format's name in a recipe.
        suffixes: the suffixes of its files.
        required: the required columns; "images|image" requires one of the two.
        optional: further columns.
        parse: maps a row's location and its record, with the format's own column names, to the row's content.
        aliases: other names by which `data.columns` may call a column.
        names: the files' names of renamed columns.
    """

    name: str
    suffixes: Sequence[str]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[str, Record], Row]
    aliases: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """All columns, by the format's own names."""
        return [*(column for columns in self.required for column in columns.split("|")), *self.optional]

    def column(self, name: str) -> str:
        """Return the files' name of a column."""
        return self.names.get(name, name)

    def with_columns(self, columns: Mapping[str, str]) -> Layout[Row]:
        """Return the layout of files with renamed columns.

        Raises:
            ValueError: the format has no such column.
        """
        for name in columns:
            if self.aliases.get(name, name) not in self.columns:
                raise ValueError(
                    f"data.columns: {self.name} has no column {name!r} to rename; it has {', '.join(self.columns)}"
                )
        return replace(self, names={self.aliases.get(name, name): column for name, column in columns.items()})

    def read(self, location: str, record: Record) -> Row:
        """Parse a row of a file.

        Raises:
            ValueError: a value is not what the format says.
            UnusableRowError: the row cannot be used.
        """
        own = {column: name for name, column in self.names.items()}
        return self.parse(location, {own.get(name, name): value for name, value in record.items()})

    def check_columns(self, location: str, columns: Collection[str], group_by: str | None) -> None:
        """Check that a file or row has the required columns, and the column to group by.

        Raises:
            ValueError: a column is missing.
        """
        present = f"(found {', '.join(columns) or 'nothing'})"
        needed = [[self.column(name) for name in names.split("|")] for names in self.required]
        missing = [names[0] for names in needed if not set(names) & set(columns)]
        if missing:
            raise ValueError(
                f"{location} has no {' and no '.join(map(repr, missing))} {present}; expected "
                f"{', '.join(' or '.join(names) for names in needed)} (data.format {self.name}): data.columns renames "
                "columns, such as {prompt: text}"
            )
        if group_by is not None and group_by not in columns:
            raise ValueError(f"data.group_by: {location} has no {group_by!r} {present}; name one of those")

    def check_files(self, path: str, split: str | None, group_by: str | None) -> None:
        """Check, without reading images, that the files exist and have the columns; the Hub is not contacted.

        Raises:
            ValueError: a file or column is missing.
        """
        if is_hub_path(path) and set(self.suffixes) & set(TABLES):
            return
        for file in find_files(path, split, self.suffixes):
            if file.suffix in TABLES:
                self.check_columns(str(file), read_schema(file).names, group_by)
                continue
            for location, record in records(file):
                self.check_columns(location, record, group_by)
                break


def find_layout(layouts: Sequence[Layout[Row]], name: str, columns: Mapping[str, str]) -> Layout[Row]:
    """Return the layout of that name, with its columns renamed.

    Raises:
        ValueError: the format is unknown, or has no such column.
    """
    by_name = {layout.name: layout for layout in layouts}
    check_known("data.format: there is no", name, by_name)
    return by_name[name].with_columns(columns)


def guess_format(layouts: Sequence[Layout[Any]], path: str) -> str:
    """Return the name of the format with the most columns in the first file of a path.

    Raises:
        ValueError: there is no file, or its columns fit no format, or several equally well.
    """
    suffixes = sorted({suffix for layout in layouts for suffix in layout.suffixes})
    file = find_files(path, None, suffixes)[0]
    if file.suffix in TABLES:
        columns = set(read_schema(file).names)
    else:
        columns = set(next((record for _, record in records(file)), {}))
    fitting = {
        layout.name: len(columns & set(layout.columns))
        for layout in layouts
        if file.suffix in layout.suffixes and all(columns & set(names.split("|")) for names in layout.required)
    }
    best = [name for name, number in fitting.items() if number == max(fitting.values())]
    if len(best) != 1:
        known = ", ".join(layout.name for layout in layouts)
        raise ValueError(
            f"{file}: its columns ({', '.join(sorted(columns)) or 'none'}) fit {' and '.join(best) or 'no format'}; "
            f"name one of {known} with --format, or rename columns in a recipe with data.columns"
        )
    return best[0]


class UnusableRowError(ValueError):
    """Error for a row that cannot be used for training; the row is skipped, counted and named.

    Attributes:
        defect: the kind of the reason.
    """

    def __init__(self, reason: str, defect: Defect = "unusable") -> None:
        super().__init__(reason)
        self.defect = defect
