"""Modules by file name, and user functions named as `module:function` in a recipe."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def names(package: str) -> list[str]:
    """Return the sorted names of a package's modules, except those that begin with an underscore."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(packages: Sequence[str], name: str, missing: str) -> ModuleType:
    """Return the module called `name` of one of the packages.

    Args:
        packages: full names of the packages to search.
        name: the file's name.
        missing: the beginning of the error message, up to the name.

    Raises:
        ValueError: no package has a module of that name.
    """
    homes = {known: package for package in packages for known in names(package)}
    check_known(missing, name, homes)
    return importlib.import_module(f"{homes[name]}.{name}")


def check_known(missing: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the nearest one.

    Raises:
        ValueError: the name is not among the known ones; the message begins with `missing`.
    """
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{missing} {name!r}{hint} (there are {', '.join(names)})")


def import_callable(key: str, name: str) -> Callable[..., Any]:
    """Import the function that a recipe names at `key`.

    Args:
        key: the recipe's key, for messages.
        name: "module:function", searched on Python's path and in the current folder. Functions of a running script or
            notebook are in the module `__main__`.

    Raises:
        ValueError: the module or function does not exist, or is not callable.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{key}: {name!r} is not a function; expected module:function, such as my_rules:mask")
    # Import, announced before the code runs
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command lacks the current folder
        sys.path.append(here)
    try:
        if not module.startswith("mmalign."):
            logger.info(f"{key}: this recipe runs {name} from {_origin(module)}")
        imported: object = reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{key}: {name} cannot be imported ({error}); expected module:function, of an installed module or one in "
            "the current folder"
        ) from error
    if not callable(imported):
        raise ValueError(f"{key}: {name} is not a function but {type(imported).__name__}")
    return imported


def _origin(module: str) -> str:
    """Return the file of a module, which is not imported; only the packages around it are."""
    if module in sys.modules:
        return str(vars(sys.modules[module]).get("__file__", "Python itself"))
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return spec.origin or "a package without a file"


def qualified_name(function: Callable[..., object]) -> str:
    """Return the name of a function or callable object's class as "module:function", as recorded in files."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
