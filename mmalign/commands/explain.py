"""`mmalign explain`: meaning, type, default and limits of every key of a recipe."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmalign.commands.load_recipe import RENAMED, recipe_class
from mmalign.config import Recipe
from mmalign.config.base import Choice, Section
from mmalign.config.methods import METHODS

_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_LIMITS = {
    Ge: ">= {0.ge}",
    Gt: "> {0.gt}",
    Le: "<= {0.le}",
    Lt: "< {0.lt}",
    MinLen: "at least {0.min_length}",
    MaxLen: "at most {0.max_length}",
}


@dataclass(frozen=True)
class Option:
    """Key of a recipe.

    Attributes:
        path: sections and key, such as "train.lr".
        kind: the type, in words.
        default: the default as in YAML; empty for a required key.
        meaning: the description.
        scopes: the methods that have this key with these properties; empty for all.
    """

    path: str
    kind: str
    default: str
    meaning: str
    scopes: tuple[str, ...] = ()


def explain(key: str | None = None) -> list[str]:
    """Return lines about a key, about the keys of a section, or about all sections.

    Args:
        key: a path such as "train.lr", a section such as "train", or the last part of a path such as "lr".

    Raises:
        ValueError: no recipe has that key; the message has the nearest one.
    """
    options = list_options()
    if key is None:
        sections = dict.fromkeys(option.path.partition(".")[0] for option in options)
        return [*sections, "", "mmalign explain SECTION lists its keys, mmalign explain SECTION.KEY one of them."]
    if key in RENAMED:
        return [f"{key} is now called {RENAMED[key]}", *explain(RENAMED[key])]
    # The key itself, else the keys of a section of this name, else keys that end like this
    exact = [option for option in options if option.path == key]
    inside = [option for option in options if option.path.startswith(f"{key}.")]
    ending = [option for option in options if option.path.endswith(f".{key}")]
    chosen = exact or inside or ending
    if not chosen:
        paths = {option.path for option in options}
        near = difflib.get_close_matches(key, [*paths, *(path.rpartition(".")[2] for path in paths)], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`mmalign explain` lists all sections"
        raise ValueError(f"explain: no recipe has a key {key!r}; {hint}")
    return [line for option in chosen for line in _paragraph(option)]


def markdown() -> str:
    """Return the page docs/recipes.md: one table per section."""
    lines = [
        "# Recipe keys",
        "",
        "All keys of recipes. `mmalign explain train.lr` prints one of them, `mmalign explain --markdown` this page.",
    ]
    section = None
    for option in list_options():
        name, _, key = option.path.partition(".")
        # The first key of a section begins its table
        if name != section:
            lines += ["", f"## {name}", "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
            section = name
        scope = f" *{', '.join(option.scopes)}.*" if option.scopes else ""
        default = f"`{option.default}`" if option.default else "required"
        cells = (f"`{key or name}`", option.kind, default, f"{_sentence(option.meaning)}{scope}")
        # A bar would end the cell
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def list_options() -> list[Option]:
    """Return every key of every method's recipe, in the order of the sections.

    A key with equal properties in several methods is listed once. `scopes` names the methods if others differ.
    """
    by_method = {name: list(_options(recipe_class(name))) for name in _method_names()}
    scopes: dict[Option, list[str]] = {}
    for name, options in by_method.items():
        for option in options:
            scopes.setdefault(option, []).append(name)
    paths = list(dict.fromkeys(option.path for options in by_method.values() for option in options))
    sections = list(Recipe.model_fields)
    paths.sort(key=lambda path: sections.index(path.partition(".")[0]))
    return [
        replace(option, scopes=() if len(names) == len(by_method) else _scope_names(names))
        for path in paths
        for option, names in scopes.items()
        if option.path == path
    ]


def _method_names() -> list[str]:
    return [str(config.model_fields["name"].default) for configs in METHODS.values() for config in configs]


def _scope_names(names: list[str]) -> tuple[str, ...]:
    """Return a modality in place of all its methods."""
    left, scopes = list(names), list[str]()
    for modality, configs in METHODS.items():
        members = [str(config.model_fields["name"].default) for config in configs]
        if set(members) <= set(left):
            scopes.append(modality.replace("_", "-"))
            left = [name for name in left if name not in members]
    return (*scopes, *left)


def _options(section: type[Section], prefix: str = "") -> Iterator[Option]:
    """Yield the keys of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        # A choice of sections, one or a list of sections, or a plain value
        choices = _choices(field)
        kinds = () if choices else _alternatives(field.annotation)
        sections = list(choices.items())
        items = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in kinds]
        sections += [("", kind) for kind in items if isinstance(kind, type) and issubclass(kind, Section)]
        # The key itself
        if choices:
            yield Option(path, ", ".join(choices), field.default.name, field.description or "")
        elif path == "method.name":
            yield Option(path, ", ".join(_method_names()), "", "method; docs/methods.md describes each")
        elif not sections or field.description:
            yield Option(path, _kind(field), _default(field), field.description or "")
        # The keys inside, after the name of the choice that has them
        inner_options = list[Option]()
        for choice, inner in sections:
            for option in _options(inner, f"{path}."):
                if choice and option.path == f"{path}.name":
                    continue
                inner_options.append(replace(option, meaning=f"{choice}: {option.meaning}") if choice else option)
        yield from dict.fromkeys(inner_options)  # alternatives may share keys


def _choices(field: FieldInfo) -> dict[str, type[Section]]:
    """Return the sections that a field chooses from, by name; empty for other fields."""
    if not any(isinstance(marker, Choice) for marker in field.metadata):
        return {}
    return Choice.sections(_plain(field.annotation))


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (types.UnionType, Union) else (annotation,)


def _kind(field: FieldInfo) -> str:
    """Return the type and the limits of a field, in words."""
    kinds = [_words(kind) for kind in _alternatives(field.annotation) if kind is not type(None)]
    return ", ".join([" or ".join(dict.fromkeys(kinds)), *_limits(field.metadata)])


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([_words(arguments[0]), *(limit for part in arguments[1:] for limit in _limits(part.metadata))])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is list:
        return f"list of ({_words(arguments[0])})"
    if origin is dict:
        return "mapping"
    return _TYPES.get(annotation, "section")


def _limits(metadata: list[Any]) -> list[str]:
    """Return the limits in a field's metadata, such as ">= 0"."""
    return [_LIMITS[type(marker)].format(marker) for marker in metadata if type(marker) in _LIMITS]


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        return "{}"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _paragraph(option: Option) -> list[str]:
    scope = f" ({', '.join(option.scopes)})" if option.scopes else ""
    default = f"default {option.default}" if option.default else "required"
    return [f"{option.path}{scope}: {option.kind}; {default}", *([f"  {option.meaning}"] if option.meaning else [])]
