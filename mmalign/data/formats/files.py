"""Readers of text files with rows: JSON, JSON lines, CSV and TSV, also gzipped, with the location of every row."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO

from mmalign.data.pairs import SkippedRow, UnusableRowError
from mmalign.reading import MAX_BYTES, check_file, parse_json, read_json
from mmalign.resources import resolve

LINES = (".jsonl", ".ndjson")
CSV = (".csv", ".tsv")
TEXTS = (".json", *LINES, *CSV)
MAX_LINE = 2**26  # 64 MiB; the bytes of a line of JSON or of a field of CSV

Record = Mapping[str, object]  # a row of JSON or of a table
Located = tuple[str, Record | SkippedRow]  # a location, and its record or the reason why there is none

_ENCODINGS = (  # by their first bytes; UTF-32 begins like UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def kind_of(file: Path) -> str:
    """Return the suffix of a file in lower case, without that of compression: ".jsonl" of "Pairs.JSONL.gz"."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Yield (location, record) for every record of a file, as `read_rows` does, and stop at the first bad row.

    Raises:
        ValueError: the file cannot be read, or has a row that is not a record {...}.
    """
    for location, record in read_rows(resolve(path)):
        if isinstance(record, SkippedRow):
            raise ValueError(f"{location} {record.reason}")
        yield location, record


def read_rows(file: Path) -> Iterator[Located]:
    """Yield (location, record) for every row of a file of JSON, JSON lines, CSV or TSV, numbered from 1.

    JSON lines are recognized in files of any name. Captioning toolkits write a dictionary {"imgToEval": {id: record}};
    its inner records are yielded. A row that is not a record is yielded with the reason.

    Raises:
        ValueError: the file cannot be read, is neither JSON nor JSON lines, or is in another encoding than UTF-8.
    """
    try:
        check_file(file, None)
        # The content decides: .jsonl may hold one list, and .json may hold lines
        head = _head(file)
        kind, is_list = kind_of(file), head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if kind in CSV:
            yield from _csv_rows(file, kind)
            return
        for location, record in _lines(file) if kind in LINES and not is_list else _entries(file, is_list):
            if isinstance(record, dict | SkippedRow):
                yield location, record
            else:
                yield location, SkippedRow(location, f"is {shorten(record)}; expected a record {{...}}")
    except gzip.BadGzipFile as error:
        raise ValueError(f"{file} is not a gzip file ({error}); download or write it again") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{file} is cut short or damaged ({error}); download or write it again") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); expected JSON, or JSON lines, in UTF-8") from error


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _head(file: Path) -> bytes:
    """Return the first bytes of a file.

    Raises:
        ValueError: they are of UTF-16 or UTF-32.
    """
    with _open(file) as stream:
        head = stream.read(256)
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), "UTF-16" if b"\0" in head[:4] else "")
    if encoding:
        raise ValueError(f"{file} is in {encoding}; save it in UTF-8, such as by iconv -f {encoding} -t UTF-8")
    return head


def _encoding_reason(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"is not in UTF-8 (byte 0x{byte:02x}; perhaps Latin-1 or Windows-1252); save the file in UTF-8"


# ----------------------------------------------------------------------------------------------------------------- JSON


def _entries(file: Path, is_list: bool) -> Iterator[tuple[str, object]]:
    """Yield the records of a JSON file; read it as JSON lines if it is not valid JSON and not a list."""
    try:
        check_file(file)
        with _open(file) as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        parsed = parse_json(content)
    except ValueError as error:
        # What is not one JSON value may be JSON lines, unless it begins with [
        if is_list:
            reason = _encoding_reason(error) if isinstance(error, UnicodeDecodeError) else f"is not JSON ({error})"
            raise ValueError(f"{file.name} {reason}; expected a list of records [{{...}}]") from error
        yield from _lines(file)
        return
    # Scores of captions by the image's id
    if isinstance(parsed, dict) and isinstance(parsed.get("imgToEval"), dict):
        yield from ((f"{file.name}: imgToEval {key}", record) for key, record in parsed["imgToEval"].items())
        return
    entries = [parsed] if isinstance(parsed, dict) else parsed  # JSON lines with a single line
    if not isinstance(entries, list):
        raise ValueError(
            f"{file.name} is {shorten(parsed)}; expected a list of records [{{...}}], or one record a line"
        )
    yield from ((f"{file.name}: entry {number}", record) for number, record in enumerate(entries, start=1))


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    num_bytes = 0
    with _open(file) as lines:  # bytes, since a truncated file may end inside a character
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            num_bytes += len(line)
            # A packed file could claim any size; a plain one is as large as it is on disk
            if num_bytes > MAX_BYTES and file.name.lower().endswith(".gz"):
                raise ValueError(f"{file} has more than {MAX_BYTES:,} bytes when unpacked; unpack it")
            if not line.strip():
                continue
            location = f"{file.name}: line {number}"
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE:,} bytes")
                yield location, parse_json(line)
            except UnicodeDecodeError as error:
                yield location, SkippedRow(location, _encoding_reason(error))
            except ValueError as error:
                reason = f"is not JSON ({error}); expected one record {{...}} a line"
                yield location, SkippedRow(location, reason)
                # The rest of such a line would be read as further ones
                if len(line) > MAX_LINE:
                    return


# ------------------------------------------------------------------------------------------------------------------ CSV


def _csv_rows(file: Path, kind: str) -> Iterator[Located]:
    """Yield the rows of a table in text, with None for empty cells; its first line names the columns.

    The delimiter of .csv is the most frequent of , ; tab and | in that line.
    """
    if not file.name.lower().endswith(".gz"):
        check_file(file)
    csv.field_size_limit(MAX_LINE)
    with _open(file) as stream:
        # Bytes that are not UTF-8 become lone surrogates, so that only their row is dropped
        texts = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        lines = _bounded(texts, file)
        first = next(lines, "")
        delimiter = "\t" if kind == ".tsv" else max(",;\t|", key=first.count)
        rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        # Columns, of whose names each may occur once; a quoted name may have several lines
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(f"{file} does not begin with the names of its columns ({error}); write them") from error
        if len(set(header)) < len(header):
            raise ValueError(f"{file} names a column twice in its first line ({listed(header)}); rename one")
        # A broken row is yielded as skipped, and the reader goes on after it
        while True:
            first_line = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                location, last_line = f"{file.name}: line {first_line}", rows.line_num
                # A quotation mark without its partner takes in all lines up to the next one
                lost = f"; lines up to {last_line:,} are lost with it" if last_line > first_line else ""
                yield location, SkippedRow(location, f"is not a row of CSV ({error}){lost}")
                continue
            if fields is None:
                return
            # The number of the row's last line in the file
            location = f"{file.name}: line {rows.line_num}"
            if any(fields):
                yield location, _csv_record(location, header, fields)


def _bounded(lines: TextIO, file: Path) -> Iterator[str]:
    """Yield the lines; a packed file could claim any size."""
    num_characters = 0
    for line in iter(lambda: lines.readline(MAX_LINE + 1), ""):
        num_characters += len(line)
        if len(line) > MAX_LINE or num_characters > MAX_BYTES:
            raise ValueError(
                f"{file} has more than {MAX_LINE:,} characters in a line, or more than {MAX_BYTES:,} in all; split it"
            )
        yield line


def _csv_record(location: str, header: list[str], fields: list[str]) -> Record | SkippedRow:
    if any(re.search("[\ud800-\udfff]", field) for field in fields):
        return SkippedRow(location, "is not in UTF-8 (perhaps Latin-1 or Windows-1252); save the file in UTF-8")
    if len(fields) != len(header):
        return SkippedRow(location, f"has {len(fields)} fields; expected {len(header)} ({listed(header)})")
    return {name: field or None for name, field in zip(header, fields, strict=True)}


# ---------------------------------------------------------------------------------------------------------------- other


def document(path: str | Path) -> dict[str, object]:
    """Read a file that holds one JSON dictionary.

    Raises:
        ValueError: the file cannot be read, or its content is not a JSON dictionary.
    """
    file, expected = resolve(path), "expected one dictionary {...}"
    content = read_json(file, expected, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is {shorten(content)}; {expected}")
    return content


def as_text(value: object) -> str:
    """Return a value of any type as text, such as the name of a group."""
    try:
        return str(value)
    except RecursionError:
        return shorten(value)


def listed(names: Collection[str]) -> str:
    """Return names with commas, at most 300 characters, for messages."""
    text = ", ".join(names) or "nothing"
    return text if len(text) <= 300 else f"{text[:297]}..."


def read_list(name: str, value: object) -> list[object]:
    """Return a list, also of one in JSON in a cell of CSV."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise UnusableRowError(f"{name} is {shorten(value)}; expected a list ({error})") from error
    if not isinstance(value, list):
        raise UnusableRowError(f"{name} is {shorten(value)}; expected a list")
    return value


_THUMBS = {
    1.0: {"true", "yes", "1", "1.0", "liked", "like", "good", "up", "desirable"},
    0.0: {"false", "no", "0", "0.0", "-1", "-1.0", "disliked", "dislike", "bad", "down", "undesirable"},
}


def read_thumb(value: object) -> float:
    """Return 1 for the label of a liked output, and 0 for that of a disliked one.

    Raises:
        UnusableRowError: the value is neither.
    """
    if value is None or value == "":
        raise UnusableRowError("has no label")
    label = next((number for number, words in _THUMBS.items() if str(value).lower() in words), None)
    if label is None:
        raise UnusableRowError(f"label is {shorten(value)}; expected true or false, 1 or 0, 1 or -1, liked or disliked")
    return label


def shorten(value: object) -> str:
    """Return a value as JSON of at most 60 characters, for messages."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:  # as deep as JSON may be where it is read, too deep where it is written
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


def read_number(name: str, value: object) -> float:
    """Return a number, also of a truth value or of a text from CSV.

    Raises:
        UnusableRowError: the value is none, or is not finite.
    """
    # The common case of large tables
    if type(value) is float and math.isfinite(value):
        return value
    try:
        number = _WORDS.get(value.lower()) if isinstance(value, str) else None
        number = float(value) if number is None and isinstance(value, str | int | float) else number
    except (ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        raise UnusableRowError(f"{name} is {shorten(value)}; expected a number")
    return number
