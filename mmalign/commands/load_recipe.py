"""Loading and validation of a recipe's YAML file, before any model is loaded.

A recipe is a tree of frozen pydantic models (`mmalign.config`). The functions that run a recipe split it into plain
arguments for the code below them.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mmalign.config import SECTIONS, Recipe
from mmalign.config.base import Choice
from mmalign.config.methods import find_method
from mmalign.reading import broken_text, read_text

logger = logging.getLogger(__name__)

RENAMED = {  # former paths of options
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.clip": "train.max_grad_norm",
    "train.keep": "train.keep_checkpoints",
    "train.pack": "train.pack_responses",
    "train.warmup": "train.warmup_steps",
    "data.hold_out": "data.validation_fraction",
    "data.max_bad_images": "data.max_bad",
    "data.workers": "data.num_workers",
    "method.cache_draws": "method.num_cached_draws",
    "method.flip_rate": "method.loss.flip_rate",
    "method.judge": "method.reward",
    "method.keep": "method.crop_area",
    "method.label_smoothing": "method.loss.label_smoothing",
    "method.sure": "method.tie_margin",
    "method.online.similar": "method.online.max_similarity",
    "evaluate.draws": "evaluate.num_noise_samples",
    "evaluate.drawing": "evaluate.sampling",
    "evaluate.judge": "evaluate.reward",
    "evaluate.per_prompt": "evaluate.images_per_prompt",
    "evaluate.pictures": "evaluate.num_images",
    "prepare.bdhs.similar": "prepare.bdhs.max_similarity",
    "prepare.contrast": "prepare.prompt_pairs",
    "prepare.drawing": "prepare.sampling",
    "prepare.images": "prepare.images_per_prompt",
    "prepare.judge": "prepare.reward",
    "prepare.realign.similar": "prepare.realign.max_similarity",
    "prepare.sure": "prepare.min_confidence",
}
ROOT = "a recipe"  # name of a recipe's top level in messages
SHOWN = 80  # characters of a wrong value in messages
MAX_BYTES = 2**20  # of a recipe
MAX_ALIASES = 16  # references to anchors; each can multiply what a recipe holds


class _Loader(yaml.SafeLoader):
    """YAML loader with YAML 1.2's numbers (1e-8 is a string in 1.1), which refuses duplicate keys."""

    _num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._num_aliases += 1
            if self._num_aliases > MAX_ALIASES:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem=f"has more than {MAX_ALIASES} aliases (*name)", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes the strings that `_Loader` reads as numbers."""


_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def load_recipe(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key and value.

    Args:
        source: a path, a run's folder, the name of a bundled recipe ("diffusion_dpo_sdxl_lora"), or the content itself.
        overrides: assignments such as "train.lr=1e-5" with values in YAML, applied in order; another "method.name"
            resets its section to that method's defaults.

    Raises:
        ValueError: a key is unknown or has a wrong value; the message names every such key, and the nearest known one.
    """
    location = str(source) if isinstance(source, str | Path) else "recipe"
    content = _parse(_read(source), location) if isinstance(source, str | Path) else source
    if not isinstance(content, Mapping):
        raise ValueError(f"{location}: expected a mapping of sections, got {_shown(content)}")
    if isinstance(source, str | Path):
        content = _at_home(source, content)
    tree = override(dict(content), overrides)
    # Schema of the method
    if (reason := broken_text(tree)) is not None:
        raise ValueError(f"{location}: {reason}")
    method = tree.get("method")
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ValueError(
            f"{location}: method: expected a mapping with a name, such as {{name: diffusion_dpo}}, got {_shown(method)}"
        )
    try:
        schema = recipe_class(method["name"])
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from None
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_sentences(location, schema, error))) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, with every default."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False)


@cache  # one class for all recipes of a method, so that equal ones compare equal
def recipe_class(method: str) -> type[Recipe]:
    """Return the recipe class of a method, whose sections depend on it.

    Raises:
        ValueError: there is no such method.
    """
    modality, config = find_method(method)
    kinds = SECTIONS[modality]
    fields: dict[str, Any] = {
        "method": (config, ...),
        "model": (kinds.model, ...),
        "data": (kinds.data, ...),
        "evaluate": (kinds.evaluate | None, None),
        "prepare": (kinds.prepare | None, None),
    }
    return create_model("Recipe", __base__=Recipe, **fields)


def _read(name: str | Path) -> str:
    from mmalign.resources import resolve_recipe

    path = resolve_recipe(name)
    path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path  # a run's folder
    return read_text(path, "expected a recipe, a short file in YAML", f"{name}:", MAX_BYTES)


def _at_home(name: str | Path, content: Mapping[str, object]) -> Mapping[str, object]:
    """Return a recipe's content; a run's folder is its own output, wherever it was moved to."""
    from mmalign.resources import resolve_recipe

    folder, output = resolve_recipe(name), content.get("output")
    is_run = (folder / "model" / "trained.json").is_file() or any(folder.glob("checkpoint-*/checkpoint.json"))
    if not is_run or not isinstance(output, str) or Path(output).resolve() == folder.resolve():
        return content
    logger.info(f"{folder}: its recipe names the output {output}; this folder is used, since it holds a run")
    return {**content, "output": str(folder)}


def _parse(text: str, location: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{location}: is not a recipe in YAML: {position}{error.problem}") from None
    except RecursionError:
        raise ValueError(f"{location}: is not a recipe in YAML: its brackets are nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # Control characters, a date in month 13, or a tag on a value of another kind
        raise ValueError(f"{location}: is not a recipe in YAML: {' '.join(str(error).split())}") from None


def read_content(path: Path) -> dict[str, object]:
    """Return the content of a recipe's file as written, without defaults or checks of its keys.

    Raises:
        ValueError: it is not YAML, or no mapping.
    """
    content = _parse(_read(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {_shown(content)}")
    return content


def dump_value(value: object) -> str:
    """Return a value as YAML that fits beside its key, such as {rank: 8}."""
    options: dict[str, Any] = {"default_flow_style": True, "width": float("inf"), "sort_keys": False}
    text: str = yaml.dump([value], Dumper=_Dumper, allow_unicode=True, **options)
    return text.strip()[1:-1]


def override(tree: dict[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Return the content of a recipe with assignments such as "train.lr=1e-5", whose sections are copied.

    Raises:
        ValueError: an assignment has another form, or names a key of what is no section.
    """
    for assignment in overrides:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"{assignment!r}: expected section.key=value, such as train.lr=1e-5")
        here = tree
        # The section, copied on the way so that the source stays
        for depth, key in enumerate(keys[:-1], start=1):
            section = {} if here.get(key) is None else here[key]
            if not isinstance(section, Mapping):
                section_key = ".".join(keys[:depth])
                raise ValueError(f"{path}: {section_key} is no section but {_shown(section)}; set {section_key} itself")
            inner = dict(section)
            here[key] = inner
            here = inner
        value = _parse(text, path)
        if keys == ["method", "name"] and value != here.get("name"):
            here.clear()  # hyper-parameters of another method have other meanings
        here[keys[-1]] = value
    return tree


def _sentences(location: str, schema: type[BaseModel], error: ValidationError) -> list[str]:
    """Return one sentence for each wrong key; the branches of a union share one."""
    places: dict[tuple[str, ...], tuple[type[BaseModel], list[ErrorDetails]]] = {}
    for details in error.errors():
        path, parent = _locate(schema, details["loc"])
        places.setdefault(path, (parent, []))[1].append(details)
    for path in list(places):  # an error inside a section replaces the error of the whole section
        if any(len(other) > len(path) and other[: len(path)] == path for other in places):
            del places[path]
    return [f"{location}: {_explain(schema, parent, list(path), errors)}" for path, (parent, errors) in places.items()]


def _locate(schema: type[BaseModel], loc: Sequence[int | str]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """Return a value's path, without the branches of unions that pydantic adds to it, and the section around it."""
    path: list[str] = []
    parent = section = schema
    branches: Mapping[str, object] = {}
    for part in map(str, loc):
        # Pydantic names the branch of a union, which no recipe does
        if part in branches and len(branches) > 1:
            section, branches = next(_sections([branches[part]]), section), {}
            continue
        path.append(part if len(part) <= SHOWN else f"{part[:SHOWN]}...")
        parent, field = section, section.model_fields.get(part)
        branches = _branches(field) if field is not None else {}
        section = next(_sections(branches.values()), section)
    return tuple(path), parent


def _exists(schema: type[BaseModel], path: Sequence[str]) -> bool:
    """Return whether some recipe of this schema has an option at this path."""
    sections = [schema]
    for key in path[:-1]:
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        sections = [section for field in fields for section in _sections(_branches(field).values())]
    return any(path[-1] in section.model_fields for section in sections)


def _branches(field: FieldInfo) -> Mapping[str, object]:
    """Return the types that a field accepts, by the names that pydantic gives them in an error's location."""
    kind: Any = field.annotation
    if any(isinstance(marker, Choice) for marker in field.metadata):
        return Choice.sections(kind)
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    names = (re.sub(r"\w+\.| ", "", str(kind)) if get_origin(kind) else kind.__name__ for kind in kinds)
    return dict(zip(names, kinds, strict=True))


def _sections(kinds: Iterable[object]) -> Iterator[type[BaseModel]]:
    """Yield the sections among the types, and those that a list holds."""
    for kind in kinds:
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield inner


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list, such as [a, b]",
    "dict_type": "a mapping, such as {key: value}",
    "model_type": "a section, such as {key: value}",
    "model_attributes_type": "a name, or a section such as {name: NAME}",
}


def _explain(schema: type[BaseModel], parent: type[BaseModel], path: list[str], errors: Sequence[ErrorDetails]) -> str:
    """Return the sentence for one wrong key: the value, the expectation and the remedy."""
    error, key, got = errors[0], ".".join(path), f"got {_shown(errors[0]['input'])}"
    kind = error["type"]
    # Unknown and missing keys
    if kind == "extra_forbidden":
        renamed = RENAMED.get(key)
        if renamed is not None and _exists(schema, renamed.split(".")):
            return f"{key}: is now called {renamed}; rename it"
        return f"{'.'.join(path[:-1]) or ROOT} has no {path[-1]!r}; {_nearest(path[-1], list(parent.model_fields))}"
    if kind == "missing":
        meaning = parent.model_fields[path[-1]].description
        expected = f"; expected {meaning}" if meaning else ""
        return f"{'.'.join(path[:-1]) or ROOT} needs {path[-1]!r}, which is missing{expected}"
    if kind == "invalid_key" or path[-1] == "[key]":
        return f"{key.removesuffix('.[key]')}: a key must be text, {got}; write it in quotes"
    if kind == "value_error":  # a section's own check, whose message has the value
        return f"{key}: {error['msg'].removeprefix('Value error, ')}"
    # Values of a wrong type, then those out of range
    if kind in _TYPES:
        expected = " or ".join(_TYPES[e["type"]] for e in errors)
        quotes = "; write it in quotes" if expected == "text" and not isinstance(error["input"], dict | list) else ""
        return f"{key}: expected {expected}, {got}{quotes}"
    # A value out of range: pydantic's own words
    message = error["msg"].removeprefix("Input should be ").removeprefix("List should have ")
    message = message.split(" after validation")[0]
    return f"{key}: expected {message[0].lower()}{message[1:]}, {got}{_closest_choice(error)}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"


def _closest_choice(error: ErrorDetails) -> str:
    """Return a hint of the choice nearest to a misspelt one, or nothing."""
    choices = re.findall(r"'(.*?)'", error["msg"]) if error["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(error["input"]), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: object) -> str:
    """Return a value as written in YAML, shortened; text is marked, since it may look like a number."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    return f"the text {shown}" if isinstance(value, str) else shown
