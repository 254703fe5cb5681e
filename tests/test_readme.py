"""What the README says can be done: its commands parse, its Python runs, and what it names is there.

The commands of docs/ too. Every case is called after its line, so that a failure says where to look.
"""

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands.load_recipe import load_recipe

ROOT = Path(mmalign.__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))

if not README.is_file():
    pytest.skip("no checkout: the installed package is under test", allow_module_level=True)

ANY_RECIPE = "configs/text_to_image/quickstart.yaml"  # what stands for RECIPE
OURS = sorted(p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name != "runs")
SOURCES = (".py", ".md", ".yaml", ".toml", ".parquet")  # of files that a command writes, none has one of these
SHORT = [
    "data.limit=4",
    "data.validation_fraction=0.0",
    "train.steps=1",
    "train.batch_size=2",
    "train.gradient_accumulation_steps=1",
    "evaluate.prompts=8",
    "evaluate.sampling.steps=1",
]


@dataclass(frozen=True)
class Piece:
    """A piece of the README or of another page: a block, a command, a name; and its line."""

    line: int
    text: str
    page: Path = README

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text.strip().splitlines()[0]}"


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub(lambda block: re.sub(r"[^\n]", "", block[0]), README.read_text(encoding="utf-8"))  # same lines


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def blocks(language: str, page: Path = README) -> list[Piece]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return [Piece(line_of(text, m.start(2)), m[2], page) for m in FENCED.finditer(text) if m[1] == language]


def spans() -> list[Piece]:
    """What stands between backticks in the prose."""
    return [Piece(line_of(PROSE, m.start()), m[1]) for m in re.finditer(r"`([^`\n]+)`", PROSE)]


def links() -> list[Piece]:
    """Where links and pictures lead, but for those to the web."""
    targets = re.finditer(r"\]\(([^)\s]+)[^)]*\)|\b(?:src|href)=\"([^\"]+)\"", PROSE)
    result = [Piece(line_of(PROSE, m.start()), m[1] or m[2]) for m in targets]
    return [link for link in result if "://" not in link.text]


def lines_of(block: Piece) -> Iterator[Piece]:
    """The commands of a block; one that goes on in the next line begins where its first line is."""
    for match in re.finditer(r"(?:.*\\\n)*.+", block.text):
        text = match[0].replace("\\\n", " ")
        if shlex.split(text, comments=True):
            yield Piece(block.line + block.text.count("\n", 0, match.start()), text, block.page)


def commands() -> Iterator[Piece]:
    """Every line of a bash block, and what reads as a command of ours in the README's prose.

    Pages of docs/ have blocks of no language too, of commands alone.
    """
    for page in (README, *DOCS):
        for block in blocks("bash", page):
            yield from lines_of(block)
    for page in DOCS:
        for block in blocks("", page):
            yield from lines_of(block)
    yield from (span for span in spans() if re.match(r"(make|mmalign|accelerate launch) ", span.text))


OWN = ("make", "mmalign", "accelerate", "python")
OTHERS = ("pip", "pytest", "git", "cd")  # nothing of these is tested


def call(text: str) -> tuple[str, list[str]]:
    """The program that a line calls, without its folder, and the arguments as a shell would hand them over."""
    words = shlex.split(text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # a setting of the environment
        words = words[1:]
    arguments = [ANY_RECIPE if word == "RECIPE" else word for word in words[1:]]
    return words[0].rpartition("/")[2], [one for word in arguments for one in expanded(word)]


def expanded(word: str) -> list[str]:
    """A word with {braces,of,alternatives} or a star, as bash takes it apart."""
    if braces := re.fullmatch(r"([^{}\s]*)\{([^{}\s]*,[^{}\s]*)\}([^{}\s]*)", word):
        return [f"{braces[1]}{one}{braces[3]}" for one in braces[2].split(",")]
    if "*" in word and "=" not in word:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(word)) or [word]
    return [word]


def of_each(pieces: list[Piece]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("piece", pieces, ids=str)


def test_the_readme_is_read_as_it_is_written() -> None:
    """Blocks, commands and links are found at all."""
    assert blocks("bash") and blocks("python") and links()
    assert {"make quickstart", "make test"} <= {" ".join(shlex.split(c.text, comments=True)) for c in commands()}
    assert {page.name for page in DOCS} <= {command.page.name for command in commands()}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are taken apart and their recipes loaded, and nothing else is done."""
    from mmalign.commands import bench, cache, compare, evaluate, gallery, prepare, quickstart, train

    for module in (cache, evaluate, gallery, prepare, quickstart, train):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(compare, "compare", load_all)
    monkeypatch.setattr(bench, "bench", load_measured)


def load_all(recipes: Sequence[str], *, overrides: Sequence[str], **_: Any) -> None:
    """In place of `compare`."""
    assert [load_recipe(name, overrides) for name in recipes]


def load_measured(source: str, *, overrides: Sequence[str], variants: Sequence[str], **_: Any) -> None:
    """Load a recipe and its variants, in place of `bench`."""
    for changes in ("", *variants):
        load_recipe(source, [*overrides, *changes.split()])


def load_requested(program: Any, options: Any) -> None:
    """Load the recipes of a measurement, in place of a program of tests.benchmarks."""
    from tests.benchmarks import against, cases, performance

    if program is not performance:
        request = against.request_of(options)
        against.recipes_of(replace(request, source=cases.content_of(request.source, ROOT)))


@pytest.mark.usefixtures("nothing_runs")
@of_each(list(commands()))
def test_commands(piece: Piece) -> None:
    program, arguments = call(piece.text)
    for name in filter(names_a_file, arguments):
        assert (ROOT / name).exists(), f"{piece}: there is no {name}"
    if program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        for target in (a for a in arguments if "=" not in a):
            assert target in targets, f"{piece}: make knows no {target}; it has {', '.join(targets)}"
    elif program == "mmalign" or "mmalign.cli" in arguments:
        actual = arguments if program == "mmalign" else arguments[arguments.index("mmalign.cli") + 1 :]
        result = CliRunner().invoke(cli.app, actual)
        assert result.exit_code == 0, f"{piece}: {result.output}"
    elif program == "python":
        module, *options = arguments[arguments.index("-m") + 1 :]
        program = importlib.import_module(module)
        load_requested(program, program.parse(options))
    else:
        assert program in OTHERS, f"{piece}: nothing here tests a call of {program}"


@of_each(blocks("python"))
def test_python(piece: Piece, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as it stands, but for settings that make it short, and has what its comments promise."""

    def shortened(source: Any, overrides: Any = ()) -> Any:
        return load_recipe(source, [*overrides, *SHORT])

    # So many empty lines before it that a traceback names the README's line.
    code = compile("\n" * (piece.line - 1) + piece.text, str(README), "exec")
    if "import mmalign" not in piece.text:
        return
    monkeypatch.setattr(mmalign, "load_recipe", shortened)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    for number, text in enumerate(piece.text.splitlines()):
        promise = re.match(r"(\w+) = .*?#(.*)", text)
        for attribute in re.findall(r"(?<!\w)\.(\w+)", promise[2] if promise else ""):
            location = f"README.md:{piece.line + number}"
            assert promise and hasattr(names[promise[1]], attribute), f"{location}: there is no .{attribute}"


@of_each(links())
def test_links(piece: Piece) -> None:
    name, _, place = piece.text.partition("#")
    path = ROOT / name if name else README
    assert path.exists(), f"{piece}: there is no such file"
    if place:
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert place in slugs, f"{piece}: {path.name} has no such heading; it has {', '.join(slugs)}"


def names_a_file(text: str) -> bool:
    """Whether a span names a file or a folder of the project, and not one that a run writes."""
    if not re.fullmatch(r"[\w.\-/]+", text) or text.startswith(("runs/", ".")):
        return False
    return text.endswith((*SOURCES, "/")) or ("/" in text and text.split("/")[0] in OURS)


@of_each([span for span in spans() if names_a_file(span.text)])
def test_files(piece: Piece) -> None:
    """A name alone is looked for everywhere; NAME is the reader's to choose, and there must be one like it already."""
    pattern = piece.text.rstrip("/").replace("NAME", "*")
    result = any(ROOT.glob(pattern)) or any(
        path for folder in OURS if (ROOT / folder).is_dir() for path in (ROOT / folder).rglob(pattern)
    )
    assert result, f"{piece}: there is no such file or folder"


@pytest.mark.parametrize(
    ("begins", "asset"),
    [
        ("Methods for text-to-image", "comparison_text_to_image.md"),
        ("Methods against hallucination", "comparison_vision_language.md"),
    ],
)
def test_a_table_has_the_numbers_of_its_asset(begins: str, asset: str) -> None:
    """Every change with an interval, in bold or not, as `mmalign compare` wrote it."""
    section = README.read_text(encoding="utf-8").partition(f"\n{begins}")[2].partition("\n[The whole table]")[0]
    written = (ROOT / "assets" / asset).read_text(encoding="utf-8")
    cells = re.findall(r"(?<=\| )(?:\*\*)?[-+][\d.]+ \[[^]]+\](?:\*\*)?(?= \|)", section)
    assert len(cells) > 10
    assert [cell for cell in cells if f"| {cell} |" not in written] == []
