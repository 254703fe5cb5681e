"""README and the pages under docs/: commands parse, code runs, links lead somewhere, numbers match their source.

Every case is named after its page and line, so that a failure says where to look.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands.load_recipe import load_recipe
from tests.helpers.doc_pages import (
    MADE,
    PAGES,
    README,
    ROOT,
    Piece,
    blocks,
    commands,
    line_number,
    links,
    prose,
    read,
    spans,
    split_command,
)
from tests.test_imports import LAYERS

if not README.is_file():
    pytest.skip("no checkout: the installed package is under test", allow_module_level=True)

FOLDERS = sorted(p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in MADE)
SOURCES = (".py", ".md", ".yaml", ".toml", ".parquet")  # no command writes a file that ends so
SHORT = [
    "data.limit=4",
    "data.validation_fraction=0.0",
    "train.steps=1",
    "train.batch_size=2",
    "train.gradient_accumulation_steps=1",
    "evaluate.prompts=8",
    "evaluate.sampling.steps=1",
]


def examples() -> Iterator[Piece]:
    """Yield the example at the end of every command's help."""
    for command in cli.app.registered_commands:
        yield Piece(ROOT / "mmalign" / "cli.py", 0, (command.epilog or "").removeprefix("For example: "))


def for_each(pieces: list[Piece]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("piece", pieces, ids=str)


def test_pages_are_read() -> None:
    assert blocks("bash") and blocks("python") and blocks("yaml") and links()
    texts = {" ".join(shlex.split(command.text, comments=True)) for command in commands()}
    assert {"make quickstart", "make test", "make docs", "mmalign quickstart vision_language"} <= texts
    assert sum(command.page == README for command in commands()) > 10


OTHERS = ("pytest", "ruff", "mypy", "git", "cd")  # their options are not checked


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse commands and load their recipes, and do nothing else."""
    from mmalign.commands import (
        bench,
        cache,
        compare,
        doctor,
        evaluate,
        export,
        gallery,
        init,
        plan,
        prepare,
        quickstart,
        show,
        train,
    )

    for module in (cache, doctor, evaluate, export, gallery, init, plan, prepare, quickstart, show, train):
        monkeypatch.setattr(module, module.__name__.rpartition(".")[2], lambda *_, **__: None)
    monkeypatch.setattr(compare, "compare", load_all)
    monkeypatch.setattr(bench, "bench", load_measured)


def load_all(recipes: Sequence[str], *, overrides: Sequence[str], **_: Any) -> None:
    """Load the recipes of `compare`."""
    assert [load_recipe(name, overrides) for name in recipes]


def load_measured(source: str, *, overrides: Sequence[str], variants: Sequence[str], **_: Any) -> None:
    """Load the recipe of `bench` and all its variants."""
    assert [load_recipe(source, [*overrides, *changes]) for changes in ([], *(each.split() for each in variants))]


@pytest.mark.usefixtures("nothing_runs")
@for_each([*commands(), *examples()])
def test_command_is_valid(piece: Piece) -> None:
    program, arguments = split_command(piece.text)
    for name in filter(names_a_file, arguments):
        assert (ROOT / name).exists(), f"{piece}: there is no {name}"
    if program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", read(ROOT / "Makefile"), re.MULTILINE)
        for target in (word for word in arguments if "=" not in word):
            assert target in targets, f"{piece}: make knows no {target}; it has {', '.join(targets)}"
    elif program == "mmalign" or "mmalign" in arguments:
        own = arguments if program == "mmalign" else arguments[arguments.index("mmalign") + 1 :]
        if not own or (len(own) == 1 and own[0] not in ("list", "explain")):  # a command's name in the prose
            own += ["--help"]
        result = CliRunner().invoke(cli.app, own)
        assert result.exit_code == 0, f"{piece}: {result.output}"
    elif program.startswith("python"):
        check_python_call(piece, arguments)
    elif program == "pip":
        check_extras(piece, arguments)
    else:
        assert program in OTHERS, f"{piece}: nothing here tests a call of {program}"


def check_python_call(piece: Piece, arguments: Sequence[str]) -> None:
    """Parse the call of a module of ours, or look for the script and its options."""
    if arguments[:2] == ["-m", "venv"]:
        return
    if arguments[0] == "-m":
        program = importlib.import_module(arguments[1])
        if program.__name__ != program.__package__:
            assert callable(program.main)
            if arguments[2:]:
                load_requested(program, program.parse(arguments[2:]))
            return
        arguments = [f"{arguments[1].replace('.', '/')}/__main__.py", *arguments[2:]]
    name, *options = arguments
    assert (ROOT / name).is_file(), f"{piece}: there is no {name}"
    for option in (word for word in options if word.startswith("--")):
        assert f'"{option}"' in read(ROOT / name), f"{piece}: {name} has no {option}"


def load_requested(program: Any, options: Any) -> None:
    """Load the recipes that a program of tests.benchmarks would measure."""
    from tests.benchmarks import against, cases, judge_annotators, performance, step_signal, studies

    if program not in (judge_annotators, performance, step_signal, studies):
        request = against.request_of(options)
        assert against.recipes_of(replace(request, source=cases.content_of(request.source, ROOT)))


def check_extras(piece: Piece, arguments: Sequence[str]) -> None:
    """Check that the extras of `pip install -e '.[...]'` exist."""
    known = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(known), f"{piece}: there are only the extras {', '.join(known)}"


@pytest.mark.slow
@for_each(blocks("python"))
def test_python_block_runs(piece: Piece, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks that use mmalign, with settings that make them short; check the imports of all others."""

    def shortened(source: Any, overrides: Any = ()) -> Any:
        return load_recipe(source, [*overrides, *SHORT])

    # Empty lines before the code make a traceback name the page's line.
    code = compile("\n" * (piece.line - 1) + piece.text, str(piece.page), "exec")
    if "mmalign" not in {name.split(".")[0] for name, _ in imports(piece)}:
        for module, name in imports(piece):
            exists = not name or hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}")
            assert exists, f"{piece}: {module} has no {name}"
        return
    monkeypatch.setattr(mmalign, "load_recipe", shortened)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    for number, text in enumerate(piece.text.splitlines()):
        promise = re.match(r"(\w+) = .*?#(.*)", text)
        for attribute in re.findall(r"(?<!\w)\.(\w+)", promise[2] if promise else ""):
            where = f"{piece.page.name}:{piece.line + number}"
            assert promise and hasattr(names[promise[1]], attribute), f"{where}: there is no .{attribute}"


def imports(piece: Piece) -> list[tuple[str, str]]:
    """Return (module, name) of every import in a block; the name is empty for whole modules."""
    pairs = []
    for node in ast.walk(ast.parse(piece.text)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pairs += [(node.module or "", alias.name) for alias in node.names]
    return pairs


@for_each(blocks("yaml"))
def test_yaml_block_loads(piece: Piece) -> None:
    """Load a block in place of the sections of the recipe that its first line names; test_plugins.py runs others."""
    if re.match(r"# my_\w+\.py\n", piece.text):
        return
    named = re.match(r"# with (\S+)\n", piece.text)
    assert named, f"{piece}: begin with '# with configs/...' to say which recipe it changes"
    recipe = yaml.safe_load(read(ROOT / named[1])) | yaml.safe_load(piece.text)
    assert load_recipe(recipe)


@for_each(blocks("json"))
def test_json_block_parses(piece: Piece) -> None:
    assert [json.loads(line) for line in piece.text.splitlines()]


@for_each(links())
def test_link_leads_somewhere(piece: Piece) -> None:
    name, _, anchor = piece.text.partition("#")
    path = (piece.page.parent / name).resolve() if name else piece.page
    assert path.exists(), f"{piece}: there is no such file"
    if anchor:
        headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{piece}: {path.name} has no such heading; it has {', '.join(slugs)}"


def names_a_file(text: str) -> bool:
    """Tell whether a span names a file or folder of the project, not one that a run writes."""
    if not re.fullmatch(r"[\w.\-/]+", text) or text.startswith((*(f"{folder}/" for folder in MADE), ".")):
        return False
    return text.endswith((*SOURCES, "/")) or ("/" in text and text.split("/")[0] in FOLDERS)


@for_each([span for span in spans() if names_a_file(span.text)])
def test_named_file_exists(piece: Piece) -> None:
    """Look for bare names everywhere. NAME is the reader's choice; at least one such file must exist."""
    pattern = piece.text.rstrip("/").replace("NAME", "*")
    exists = any(ROOT.glob(pattern)) or any(
        path for folder in FOLDERS if (ROOT / folder).is_dir() for path in (ROOT / folder).rglob(pattern)
    )
    assert exists, f"{piece}: there is no such file or folder"


CHANGE = re.compile(r"(\*\*)?([-+][\d.]+ \[[-\d.]+, [-\d.]+\])(\*\*)?")


def measured_tables() -> list[Piece]:
    """Return the tables after a comment `<!-- numbers: FILE ... -->`, which names the JSON that they were made from."""
    comment = re.compile(r"<!-- numbers: (.+) -->\n\n((?:\|.*\n)+)")
    return [
        Piece(page, line_number(read(page), match.start()), f"{match[1]}\n{match[2]}")
        for page in PAGES
        for match in comment.finditer(read(page))
    ]


def test_measured_tables_are_found() -> None:
    pages = {table.page.name for table in measured_tables()}
    assert pages == {
        "README.md",
        "comparison_text_to_image.md",
        "comparison_vision_language.md",
        "online.md",
        "studies.md",
    }


@for_each(measured_tables())
def test_measured_table_matches_its_source(piece: Piece) -> None:
    """Compare changes with the JSON of `mmalign compare`: a column is one measure, and bold one beyond chance."""
    name, *lines = piece.text.splitlines()
    rows = [row for file in name.split() for row in json.loads(read(ROOT / file))]
    possible: dict[int, set[tuple[str, int | None]]] = {}  # from a column to the measures that fit all its cells so far
    for line in lines[2:]:
        (method,) = re.findall(r"best of \d+|(?<=`)[\w.]+(?=`)", line)[:1]
        for column, cell in enumerate(line.split(" | ")):
            if match := CHANGE.fullmatch(cell.strip("| ")):
                fitting = measures_of(rows, method, match[2], bold=bool(match[1] and match[3]))
                possible[column] = possible.get(column, fitting) & fitting
                assert possible[column], f"{piece}: {method}: {cell} is not in {name} where the column's others are"
    assert possible, f"{piece}: no cell is a change with an interval"


def measures_of(rows: list[Any], method: str, cell: str, *, bold: bool) -> set[tuple[str, int | None]]:
    """Return the measures, and the numbers of pairs, for which the change of a method or of a named run reads so."""
    return {
        (label, row["at"])
        for row in rows
        if method in (row["method"], row["name"])
        for label, values in row["measures"].items()
        if in_points(change := values["change"]) == cell and bold == is_beyond_chance(change)
    }


def is_beyond_chance(change: dict[str, float]) -> bool:
    """Tell whether a change survives the correction for all comparisons of its table."""
    return change["p_holm"] < 0.05


def in_points(change: dict[str, float]) -> str:
    """Return a change as the pages write it: in points, with its interval."""
    estimate, low, high = (100 * change[key] for key in ("estimate", "low", "high"))
    return f"{estimate:+.1f} [{low:.1f}, {high:.1f}]"


def test_every_page_is_in_the_navigation() -> None:
    navigation = read(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    missing = [page.name for page in PAGES if page.parent == ROOT / "docs" and page.name not in navigation]
    assert missing == []


def test_architecture_has_the_floor_of_every_module() -> None:
    """Compare the table of floors with the layers that tests/test_imports.py checks."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", read(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    floors = [
        {name for floor, names in rows if int(floor) == height for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}
        for height in range(1, len(LAYERS) + 1)
    ]
    assert floors == [{name for name in layer if list((ROOT / "mmalign").glob(f"{name}*"))} for layer in LAYERS]
