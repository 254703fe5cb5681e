"""Layouts of preference data: the columns of a format, their names in the files, and the recognition of a layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, TypeVar

from mmalign.data.formats.files import Record, as_text, listed
from mmalign.data.formats.labels import NUMBERED_SCORES, SCORES, Margins
from mmalign.data.formats.sources import Source, is_hub_path, open_source
from mmalign.data.label import FIELDS
from mmalign.data.pairs import UnusableRowError
from mmalign.registry import check_known
from mmalign.resources import locate

AUTO = "auto"  # name of the format that is recognized
THUMBS = "thumbs"  # name of the layout of single outputs with labels

Learning = Literal["pairs", "thumbs", "lists", "prompts"]  # kind of the rows that a method learns from

Row = TypeVar("Row", covariant=True)


def _any(record: Record) -> bool:
    return True


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """Columns of a format, by the format's own names.

    Attributes:
        name: the format's name in a recipe.
        required: the required columns; "images|image" requires one of the two.
        optional: further columns.
        parse: maps a row's location and its record, with the format's own column names, to the row's content.
        aliases: other names by which `data.columns` may call a column.
        names: the files' names of renamed columns.
        synonyms: other names by which columns are recognized in files.
        fits: whether a sample of the values, with the format's own column names, can be of this layout.
        has_labels: rows are pairs, which may have the columns of labels.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[str, Record], Row]
    aliases: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fits: Callable[[Record], bool] = _any
    has_labels: bool = True

    @property
    def columns(self) -> list[str]:
        """All columns, by the format's own names."""
        labels = (*FIELDS, *SCORES) if self.has_labels else ()
        return [*(column for columns in self.required for column in columns.split("|")), *self.optional, *labels]

    def unread(
        self, columns: Collection[str], group_by: str | None, *, labels: Collection[str], margins: Margins
    ) -> tuple[str, ...]:
        """Return the columns of files that nothing reads."""
        scored = margins.kind != "column" and "margin" in labels
        idle = {*FIELDS} - {*labels} | ({"margin"} if scored else {*SCORES, *NUMBERED_SCORES})
        read = {self.column(name) for name in self.columns if name not in idle} | {group_by}
        return tuple(name for name in columns if name not in read)

    def column(self, name: str) -> str:
        """Return the files' name of a column."""
        return self.names.get(name, name)

    def with_columns(self, columns: Mapping[str, str]) -> Layout[Row]:
        """Return the layout of files with renamed columns.

        Raises:
            ValueError: the format has no such column, or two columns have one name in the files.
        """
        # Renaming takes the format's own names, or an alias of them
        for name in columns:
            if self.aliases.get(name, name) not in self.columns:
                raise ValueError(
                    f"data.columns: {self.name} has no column {name!r} to rename; it has {', '.join(self.columns)}"
                )
        names = {self.aliases.get(name, name): column for name, column in columns.items()}
        # Two required columns cannot be one column of the files
        for name, column in names.items():
            others = [
                other for other in (*names, *self.required) if other != name and names.get(other, other) == column
            ]
            if others:
                raise ValueError(
                    f"data.columns: {self.name} would read both {name} and {others[0]} from {column!r}; name another "
                    "column for one of them"
                )
        return replace(self, names=names)

    def read(self, location: str, record: Record) -> Row:
        """Parse a row of a file.

        Raises:
            UnusableRowError: the row cannot be used, since a column is missing or a value is not what the format says.
        """
        # Sets are compared at once, for the rows of a large file
        missing = [] if record.keys() >= self._first else self.missing(record)
        if missing:
            raise UnusableRowError(f"has no {' and no '.join(map(repr, missing))} (found {listed(record)})")
        try:
            return self.parse(location, self.own_names(record))
        except UnusableRowError:
            raise
        except ValueError as error:
            raise UnusableRowError(str(error).removeprefix(f"{location}: ")) from error

    def own_names(self, record: Record) -> Record:
        """Return a record by the format's own column names."""
        own = self._own
        if not own:
            return record
        renamed = {
            own.get(name, name): value for name, value in record.items() if name in own or self.column(name) == name
        }
        # Scores that stand for the labels give margins too
        both = (name for name in NUMBERED_SCORES if name in own and self.column(name) == name)
        return renamed | {name: record[name] for name in both if name in record}

    def missing(self, columns: Collection[str]) -> list[str]:
        """Return the required columns that files do not have, by the files' names."""
        return [names[0] for names in self._needed if not any(name in columns for name in names)]

    @cached_property
    def _own(self) -> dict[str, str]:
        """Own names of renamed columns, by the files' names."""
        return {column: name for name, column in self.names.items() if name != column}

    @cached_property
    def _first(self) -> frozenset[str]:
        """Files' names of each required column, or of its first alternative."""
        return frozenset(names[0] for names in self._needed)

    @cached_property
    def _needed(self) -> list[list[str]]:
        """Files' names of each required column, with its alternatives."""
        return [[self.column(name) for name in names.split("|")] for names in self.required]

    def check_columns(self, location: str, columns: Collection[str], group_by: str | None) -> None:
        """Check that a file has the required columns, and the column to group by.

        Raises:
            ValueError: a column is missing.
        """
        if missing := self.missing(columns):
            expected = [" or ".join(self.column(name) for name in names.split("|")) for names in self.required]
            raise ValueError(
                f"{location} has no {' and no '.join(map(repr, missing))} (found {listed(columns)}); expected "
                f"{', '.join(expected)} (data.format {self.name}): data.columns renames columns, such as "
                "{prompt: text}"
            )
        if group_by is not None and group_by not in columns:
            raise ValueError(
                f"data.group_by: {location} has no {group_by!r} (found {listed(columns)}); name one of those"
            )

    def group(self, record: Record, group_by: str) -> str:
        """Return the value of the column to group by, as text.

        Raises:
            UnusableRowError: the row has no such column.
        """
        if group_by not in record:
            raise UnusableRowError(f"has no {group_by!r}, which data.group_by names")
        return as_text(record[group_by])

    def recognized(self, columns: Collection[str], sample: Record) -> Layout[Row] | None:
        """Return the layout with the files' names of its columns, found by `synonyms`; None if it does not fit.

        A column of the files stands for one column of the layout; a renamed column keeps its name.
        """
        names = self._find(columns, set(self.columns)) or self._find(columns, set())
        layout = replace(self, names=names) if names is not None else None
        return layout if layout is not None and self.fits(layout.own_names(sample)) else None

    def _find(self, columns: Collection[str], reserved: Collection[str]) -> dict[str, str] | None:
        """Return the files' names of the columns; those that are reserved are no synonyms of another."""
        # A group is a column with its alternatives ("a|b"), of which a file needs one
        free = {_word(name): name for name in columns if name not in self.names.values()}
        names = dict(self.names)
        for group in (*self.required, *self.optional):
            alternatives = group.split("|")
            if any(name in names for name in alternatives):
                continue
            # Own names first, then synonyms; another column's own name is no synonym
            words = [(name, name) for name in alternatives]
            words += [(name, word) for name in alternatives for word in self.synonyms.get(name, ())]
            keys = ((name, _word(word), name == word) for name, word in words)
            match = next(((n, key) for n, key, own in keys if key in free and (own or free[key] not in reserved)), None)
            if match is not None:
                names[match[0]] = free.pop(match[1])
            elif group in self.required:
                return None
        return names

    def describe(self) -> str:
        """Return the name of a recognized layout, and what each column was taken for."""
        columns = ", ".join(own if own == column else f"{own} is {column!r}" for own, column in self.names.items())
        return f"{self.name} ({columns})"


def _word(name: str) -> str:
    """Return a column's name without case and separators, by which synonyms are compared."""
    return re.sub(r"[\W_]", "", name.lower())


def find_layout(layouts: Sequence[Layout[Row]], name: str, columns: Mapping[str, str]) -> Layout[Row]:
    """Return the layout of that name, with its columns renamed.

    Raises:
        ValueError: the format is unknown, or has no such column.
    """
    by_name = {layout.name: layout for layout in layouts}
    check_known("data.format: there is no", name, [*by_name, AUTO])
    return by_name[name].with_columns(columns)


def layouts_for(
    layouts: Sequence[Layout[Row]], thumbs: Layout[Row], learning: Learning, *, cut_pairs: bool
) -> Sequence[Layout[Row]]:
    """Return the layout of thumbs for methods that learn from them, unless pairs are cut; else all other layouts."""
    return (thumbs,) if learning == "thumbs" and not cut_pairs else layouts


def open_layout(
    layouts: Sequence[Layout[Row]],
    name: str,
    path: str,
    *,
    split: str | None,
    columns: Mapping[str, str] | None,
    group_by: str | None,
) -> tuple[Source, Layout[Row]]:
    """Find the files of a path; return them with the layout of that name, or for "auto" with the one that fits best.

    Raises:
        ValueError: the format is unknown, no file matches, no layout fits, or a column is missing.
    """
    # An error on thumbs may mean that the rows are pairs
    of_thumbs = layouts[0].name == THUMBS
    try:
        layout = find_layout(layouts, name, columns or {}) if name != AUTO else None
        source = open_source(path, split, thumbs=of_thumbs)
        if layout is None:
            layout = recognize(_renamed(layouts, columns or {}), source.columns, source.sample, f"data.path: {path}")
        layout.check_columns(path, source.columns, group_by)
        _check_renamed(columns or {}, path, source.columns)
    except ValueError as error:
        hint = "; data.cut_pairs: true makes single outputs with labels of pairs" if of_thumbs else ""
        raise ValueError(f"{error}{hint}") from error
    return source, layout


def _check_renamed(renamed: Mapping[str, str], path: str, columns: Collection[str]) -> None:
    """Check that files have the columns that data.columns names, also those that a row can do without."""
    missing = [f"{column!r} for {name}" for name, column in renamed.items() if column not in columns]
    if missing:
        raise ValueError(
            f"data.columns: {path} has no {' and no '.join(missing)} (found {listed(columns)}); name one of those, or "
            "leave it out"
        )


def check_files(
    layouts: Sequence[Layout[Row]],
    name: str,
    path: str,
    *,
    images: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    group_by: str | None = None,
) -> None:
    """Check that files, their columns and the folder of images exist; no image is read, and no Hub is contacted.

    Raises:
        ValueError: the format is unknown, a file, folder or column is missing, or no layout fits.
    """
    if images is not None and not Path(locate(images)).is_dir():
        raise ValueError(f"data.images: {images} is not a folder; expected the folder of the images' paths")
    if not is_hub_path(path):
        open_layout(layouts, name, path, split=split, columns=columns, group_by=group_by)
    elif name != AUTO:
        find_layout(layouts, name, columns or {})


def _renamed(layouts: Sequence[Layout[Row]], columns: Mapping[str, str]) -> list[Layout[Row]]:
    """Return the layouts that have all the renamed columns.

    Raises:
        ValueError: no layout has them.
    """
    able = [layout for layout in layouts if all(layout.aliases.get(name, name) in layout.columns for name in columns)]
    if not able:
        known = dict.fromkeys(name for layout in layouts for name in layout.columns)
        raise ValueError(f"data.columns: no layout has {', '.join(columns)}; known columns are {', '.join(known)}")
    return [layout.with_columns(columns) for layout in able]


def recognize(
    layouts: Sequence[Layout[Row]], columns: Collection[str], sample: Record, place: str = "data.path"
) -> Layout[Row]:
    """Return the layout that accounts for most columns of files, with their names; its `describe` says them.

    `sample` has a value of every column, and messages begin with `place`.

    Raises:
        ValueError: no layout fits, or several fit equally well.
    """
    fitting = [layout for known in layouts if (layout := known.recognized(columns, sample)) is not None]
    # Most columns, and of equal ones those with their own names
    scores = [(len(layout.names), sum(own == name for own, name in layout.names.items())) for layout in fitting]
    best = [layout for layout, score in zip(fitting, scores, strict=True) if score == max(scores)]
    if len(best) == 1:
        return best[0]
    # Several layouts fit equally well, or none does; then the nearest is named
    known = ", ".join(layout.name for layout in layouts)
    if best:
        raise ValueError(
            f"{place}: its columns ({listed(columns)}) fit {' and '.join(layout.name for layout in best)}; name one "
            "with data.format"
        )
    nearest = min(layouts, key=lambda layout: len(layout.missing(columns)) / len(layout.required))
    lacks = " and no ".join(map(repr, nearest.missing(columns)))
    came = f"has no {lacks}" if lacks else f"has other values than {nearest.name}"
    raise ValueError(
        f"{place} {came} (found {listed(columns)}); expected a known layout, of which {nearest.name} "
        f"({', '.join(nearest.required)}) is nearest: rename columns with data.columns, such as {{prompt: text}}, or "
        f"name the layout with data.format ({known})"
    )
