"""Modules by file name, and functions and classes from outside, named as `module:attribute` in a recipe."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce, wraps
from importlib.machinery import PathFinder
from itertools import accumulate
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        ValueError: the module cannot be imported, or the function does not exist or is not callable.
    """
    imported = _import(key, name, "function")
    if not callable(imported):
        raise ValueError(f"{key}: {name} is not a function but {type(imported).__name__}")
    return imported


@cache  # the file is announced once
def import_class(key: str, name: str, base: type[T]) -> type[T]:
    """Import the class that a recipe names at `key` as "module:Class".

    Raises:
        ValueError: it cannot be imported, or is no class derived from `base`.
    """
    imported = _import(key, name, "Class")
    if not (isinstance(imported, type) and issubclass(imported, base)):
        raise ValueError(f"{key}: {name} is not a class derived from {base.__module__}.{base.__qualname__}")
    return imported


def module_of(key: str, plugin: type, functions: Sequence[str]) -> ModuleType:
    """Return the module of a class from outside, which has functions beside the class.

    Raises:
        ValueError: a function is missing.
    """
    module = sys.modules[plugin.__module__]
    missing = [name for name in functions if not callable(vars(module).get(name))]
    if missing:
        raise ValueError(
            f"{key}: {qualified_name(plugin)} has no {' and no '.join(missing)} beside it; expected the functions "
            f"{', '.join(functions)} in {module.__name__} (docs/extending.md)"
        )
    return module


def is_outside(name: str) -> bool:
    """Return whether a name is "module:attribute", and not that of a file of mmalign."""
    return ":" in name


def _import(key: str, name: str, kind: str) -> object:
    """Import what a recipe names; the log names the file before any of its code runs.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{key}: {name!r} is not a {kind.lower()}; expected module:{kind}, such as my_rules:mask")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command lacks the current folder
        sys.path.append(here)
    try:
        if not module.startswith("mmalign."):
            logger.info(f"{key}: this recipe runs {name} from {_origin(module)}")
        imported: object = reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # the module's own code runs here
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{key}: {name} cannot be imported ({reason}); expected module:{kind}, of an installed module or one in "
            "the current folder"
        ) from error
    return imported


def source_file(name: str) -> Path | None:
    """Return the file of the module of "module:attribute"; None if it has none, as in a notebook."""
    path = Path(_origin(name.partition(":")[0]))
    return path if path.is_file() else None


def _origin(module: str) -> str:
    """Return the file of a module; neither it nor the packages around it are imported."""
    if module in sys.modules:
        return str(vars(sys.modules[module]).get("__file__", "Python itself"))
    # `find_spec` of a dotted name would import the packages around the module
    top, *inner = accumulate(module.split("."), "{}.{}".format)
    spec = importlib.util.find_spec(top)
    for name in inner:
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or []) if spec else None
    if spec is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return spec.origin or "a package without a file"


class Located(Protocol):
    """Row of data with its location."""

    @property
    def location(self) -> str:
        """The row's location, for messages."""
        ...


def import_function(key: str, name: str, arguments: Sequence[str], result: str) -> Callable[..., Any]:
    """Import a user's function of positional arguments.

    Args:
        key: the recipe's key, for messages.
        name: "module:function".
        arguments: the names of its positional arguments.
        result: the result in words.

    Raises:
        ValueError: the function cannot be imported, is built into Python, is a class or takes other arguments.
    """
    function, expected = import_callable(key, name), _expected(arguments, result)
    if isinstance(function, BuiltinFunctionType | type):
        kind = "a class" if isinstance(function, type) else "built into Python"
        raise ValueError(f"{key}: {name} is {kind}; {expected}")
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {name} takes other arguments ({error}); {expected}") from error
    return function


def _expected(arguments: Sequence[str], result: str) -> str:
    return f"expected a function from ({', '.join(arguments)}) to {result}"


def user_function(
    key: str, name: str, arguments: Sequence[str], result: str, is_valid: Callable[[Any], bool]
) -> Callable[..., Any]:
    """Import a user's function that maps a row, and perhaps more, to a result, and check each of its results.

    Args:
        key: the recipe's key, for messages.
        name: "module:function".
        arguments: the names of its positional arguments, the row first.
        result: the result in words.
        is_valid: a check of a result.

    Raises:
        ValueError: the function cannot be imported, is built into Python, is a class or takes other arguments; or, when
            called, it raises an error or returns something else. The message names the function and the row.
    """
    function, expected = import_function(key, name, arguments, result), _expected(arguments, result)

    @wraps(function)
    def call(row: Located, *others: object) -> Any:
        # Code of others may raise anything
        try:
            value = function(row, *others)
        except Exception as error:
            raise ValueError(
                f"{key}: {name} failed at {row.location} ({type(error).__name__}: {error}); correct it, or leave this "
                "row out (MMALIGN_TRACEBACK=1 shows the line)"
            ) from error
        if not is_valid(value):
            raise ValueError(f"{key}: {name} gave {value!r:.60} at {row.location}; {expected}")
        return value

    return call


def qualified_name(function: Callable[..., object]) -> str:
    """Return the name of a function or callable object's class as "module:function", as recorded in files."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
