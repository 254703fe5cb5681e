"""Modules by the names of their files: what a folder offers is what lies in it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from typing import Any


def names(package: str) -> list[str]:
    """The files of a package of ours, but for those with an underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(sys.modules[package].__path__) if not m.name.startswith("_"))


def find(package: str, name: str, missing: str) -> Any:
    """The module of a name; `missing` is how the sentence begins where there is none, up to the name.

    Raises:
        ValueError: there is no such file.
    """
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{missing} {name!r}{hint} (there are {', '.join(known)})")
    return importlib.import_module(f"{package}.{name}")
