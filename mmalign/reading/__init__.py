"""Bounded readers of files that others wrote; every error names the file, the reason and the remedy."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

MAX_BYTES = 2**31  # 2 GiB; MSCOCO's and LLaVA's largest files have half of it

_HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate in a text
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # a surrogate in JSON, escaped or encoded

T = TypeVar("T")


def check_file(path: str | Path, max_bytes: int | None = MAX_BYTES) -> None:
    """Check that a path is a regular file of at most `max_bytes`; a pipe or device could be read for ever.

    Raises:
        OSError: the file does not exist, is not regular or is too large.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, more than {max_bytes:,}")


def read_text(path: Path, remedy: str, place: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        remedy: the end of the error message: what was expected, or what to do.
        place: the beginning of the error message; the path if not given.
        max_bytes: the largest size.

    Raises:
        ValueError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        check_file(path, max_bytes)
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{place or path} cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place or path} cannot be read ({error}); {remedy}") from error


def parse_json(text: str | bytes) -> object:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has half of a character; the message is a reason
            without a place.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    # Only texts with traces of halves are searched for one
    is_suspect = _SURROGATES.search(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if is_suspect and (reason := broken_text(content)):
        raise ValueError(reason)
    return content


def read_json(path: Path, remedy: str, place: str = "") -> object:
    """Read a JSON file of any content; the arguments are those of `read_text`.

    Raises:
        ValueError: the file cannot be read, or is not JSON in UTF-8.
    """
    try:
        check_file(path)
        return parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{place or path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{place or path} is not JSON in UTF-8 ({error}); {remedy}") from error


def read_as(kind: type[T], path: Path, remedy: str) -> T:
    """Read a JSON file that mmalign wrote, of a fixed shape.

    Args:
        kind: the shape: a dataclass, a TypedDict or another type that pydantic validates.
        path: the file.
        remedy: the end of the error message.

    Raises:
        ValueError: the file cannot be read, is damaged, or has another shape.
    """
    try:
        check_file(path)
        return parse_as(kind, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is damaged or of another version ({error}); {remedy}") from error


def parse_as(kind: type[T], text: bytes) -> T:
    """Parse JSON of a fixed shape.

    Raises:
        ValueError: the text is not JSON, or has another shape; the message is a reason without a place.
    """
    shape: Any = kind  # mypy takes no class for hashable
    try:
        value: T = _adapter(shape).validate_python(parse_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
    return value


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, at most 200 characters; not torch's advice to trust a pickle."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .")
    if "weights_only" in str(error):
        line = "damaged, or more than tensors in it"
    return line if len(line) <= 200 else f"{line[:200]}..."


def error_line(error: BaseException) -> str:
    """Return the type and the first line of a library's error, whose message may fill a page."""
    return f"{type(error).__name__}: {first_line(error)}"


def broken_text(value: object) -> str | None:
    """Return a sentence about the first text with half of a character (a lone surrogate); None if there is none.

    Args:
        value: a text, or texts in lists and mappings, as JSON and YAML give them; other values are skipped.
    """
    # A list of values still to visit, since nesting may be deeper than Python's stack
    left: list[tuple[tuple[object, ...], object]] = [((), value)]
    while left:
        path, here = left.pop()
        if isinstance(here, str) and (half := _HALF.search(here)):
            name = f"{printable('.'.join(map(str, path)))} has" if path else "has"
            return (
                f"{name} half of a character (\\u{ord(half[0]):x}), which no file can hold; write the whole character"
            )
        # Keys are texts too; numbers are not visited
        if isinstance(here, Mapping):
            left += [((*path, "a key"), key) for key in here]
            left += [((*path, key), inner) for key, inner in here.items() if not isinstance(inner, int | float)]
        elif isinstance(here, list | tuple):
            left += [((*path, index), inner) for index, inner in enumerate(here) if not isinstance(inner, int | float)]
    return None


def printable(text: str) -> str:
    """Return a text with halves of characters written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
