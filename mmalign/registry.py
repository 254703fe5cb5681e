"""Modules by file name, and user functions named as `module:function` in a recipe."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any


def names(package: str) -> list[str]:
    """Return the modules of a package of ours, but for those with an underscore."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(packages: Sequence[str], name: str, missing: str) -> Any:
    """Return the module called `name` of one of the packages.

    Args:
        packages: where to look, by their full names.
        name: the file's name.
        missing: the beginning of the error message, up to the name.

    Raises:
        ValueError: there is no such file.
    """
    homes = {known: package for package in packages for known in names(package)}
    if name not in homes:
        near = difflib.get_close_matches(name, homes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{missing} {name!r}{hint} (there are {', '.join(sorted(homes))})")
    return importlib.import_module(f"{homes[name]}.{name}")


def import_callable(key: str, name: str) -> Callable[..., Any]:
    """The function that a recipe names at `key`.

    Args:
        key: where the name stands, for messages.
        name: "module:function"; modules are looked for as Python does, and in the current folder. What a script or a
            notebook defines itself is in the module `__main__`.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{key}: {name!r} names no function; expected module:function, such as my_rules:mask")
    here = str(Path.cwd())
    if here not in sys.path:  # a script that Python was given has it, an installed command has not
        sys.path.append(here)
    try:
        function_found = reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{key}: {name} cannot be imported ({error}); expected module:function, of an installed module or one in "
            "the current folder"
        ) from error
    if not callable(function_found):
        raise ValueError(f"{key}: {name} is no function but {type(function_found).__name__}")
    own: Callable[..., Any] = function_found
    return own


def qualified_name(function: Callable[..., Any]) -> str:
    """What a function is called where it is written down: module:function."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
