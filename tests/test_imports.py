"""Imports point down, and `import mmalign.losses.pairwise` needs torch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmalign

PACKAGE = Path(mmalign.__file__).parent

# From the bottom to the top. A module of mmalign/ (a file or a folder) imports from its own layer and from lower ones.
LAYERS = (
    {"config", "losses", "rng", "registry", "reading", "resources", "atomic_io", "console"},
    {"policy", "attention", "diffusion", "language", "rewards", "toy"},
    {"families"},
    {"data", "judges"},
    {"synthesis"},
    {"methods"},
    {"training", "evaluation", "pages", "doctor"},
    {"modalities"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
)
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """A statement at a line of a file of `source` that imports from `target`, both modules of mmalign/."""

    source: str
    target: str
    line: int

    @property
    def points_up(self) -> bool:
        """Whether the target's layer is above the source's; a module without a layer is another test's."""
        return HEIGHT.get(self.target, 0) > HEIGHT.get(self.source, len(LAYERS))


def room(path: Path, package: Path = PACKAGE) -> str:
    """The file or folder of mmalign/ that a source file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    """A file's imports of our own modules, also those inside functions; not those for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    folder = path.relative_to(package.parent).parent.parts
    typing_only = inside(node.body for node in ast.walk(tree) if isinstance(node, ast.If) and is_type_checking(node))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or node in typing_only:
            continue
        for name in imported_names(node, folder):
            first, *rest = name.split(".")
            if first == "mmalign":
                # `from mmalign import x`: the module x, or else a name that mmalign/__init__.py offers.
                known = len(rest) > 1 or (rest and (rest[0] in HEIGHT or (package / rest[0]).is_dir()))
                yield Import(room(path, package), rest[0] if known else "__init__", node.lineno)


def inside(bodies: Iterable[list[ast.stmt]]) -> set[ast.AST]:
    """Every node of these blocks."""
    return {node for body in bodies for statement in body for node in ast.walk(statement)}


def is_type_checking(node: ast.If) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    return ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def imported_names(node: ast.Import | ast.ImportFrom, folder: tuple[str, ...]) -> list[str]:
    """Full dotted names of what a statement imports; `folder` is the package of its file, for relative imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = folder[: len(folder) - node.level + 1] if node.level else ()
    source = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{source}.{alias.name}" for alias in node.names]


def upward(path: Path, package: Path = PACKAGE) -> list[str]:
    """The imports of a file that point up, as 'file:line: this imports that'."""
    result = imports_of(path, package)
    return [f"{path.name}:{i.line}: {i.source} imports {i.target}" for i in result if i.points_up]


def test_every_module_has_its_place() -> None:
    unknown = {room(path) for path in FILES} - set(HEIGHT)
    location = f"add it to LAYERS in tests/{Path(__file__).name}, as low as its own imports allow"
    assert not unknown, f"{', '.join(sorted(unknown))} of mmalign/ is in no layer: {location}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert upward(path) == [], "move what is shared down, or take it as an argument; LAYERS in this file is the order"


def test_no_two_modules_need_each_other() -> None:
    needs: dict[str, set[str]] = {}
    for result in (i for path in FILES for i in imports_of(path)):
        if result.source != result.target:
            needs.setdefault(result.source, set()).add(result.target)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("from mmalign.training.loop import train", ["policy.py:1: policy imports training"]),
        ("from mmalign import methods, losses", ["policy.py:1: policy imports methods"]),
        ("def f():\n    import mmalign.families.base.sd", ["policy.py:2: policy imports families"]),
        ("from .families import sd", ["policy.py:1: policy imports families"]),
        ("from . import cli", ["policy.py:1: policy imports cli"]),
        ("from mmalign import version", ["policy.py:1: policy imports __init__"]),
        ("if TYPE_CHECKING:\n    from mmalign.families.base import TextToImage", []),
        (
            "if TYPE_CHECKING:\n    pass\nelse:\n    from mmalign.families.base import x",
            ["policy.py:4: policy imports families"],
        ),
        ("from mmalign.losses.pairwise import Pair\nimport torch", []),
        (
            "async def f():\n    from mmalign import methods, cli",
            ["policy.py:2: policy imports methods", "policy.py:2: policy imports cli"],
        ),
    ],
)
def test_the_finder_finds(source: str, seen: list[str], tmp_path: Path) -> None:
    package = tmp_path / "mmalign"
    package.mkdir()
    (package / "policy.py").write_text(source)
    assert upward(package / "policy.py", package) == seen


def test_only_commands_and_modalities_see_a_recipe() -> None:
    below = [path for path in FILES if room(path) not in {"commands", "modalities", "config", "cli", "__init__"}]
    seen = [
        path.relative_to(PACKAGE).as_posix()
        for path in below
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.alias) and node.name == "Recipe")
        or (isinstance(node, ast.Attribute) and node.attr == "Recipe")
    ]
    assert not seen, f"{', '.join(seen)}: take the sections that are needed, or plain arguments"


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_no_module_shadows_a_public_function() -> None:
    """A submodule becomes an attribute of the package once it is imported, and would replace a function of its name."""
    assert [name for name in mmalign.__all__ if name in {room(path) for path in FILES}] == []


@pytest.mark.slow
def test_losses_need_torch_alone() -> None:
    heavy = {
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "open_clip",
        "pydantic",
        "scipy",
        "PIL",
        "typer",
    }
    modules = loaded_by("import mmalign.losses.pairwise")
    assert "torch" in modules
    assert not modules & heavy


@pytest.mark.slow
def test_methods_load_no_compiler() -> None:
    """Its import takes a second, which every test of a loss would pay."""
    loaded_by("import sys, mmalign.methods\nassert 'torch._dynamo' not in sys.modules")


@pytest.mark.slow
def test_command_line_imports_nothing_heavy() -> None:
    heavy = {"diffusers", "transformers", "datasets", "open_clip", "torchvision"}
    assert not loaded_by("import mmalign, mmalign.cli, mmalign.rewards.open_clip") & heavy


@pytest.mark.slow
def test_a_recipe_is_checked_without_torch() -> None:
    """Check also a mistake in the method's own settings, which its config refuses."""
    load = "from mmalign.commands.load_recipe import load_recipe"
    for name in ("text_to_image/spo_tiny_sd", "vision_language/quickstart", "text_to_image/step_preference_tiny_sd"):
        assert "torch" not in loaded_by(f"{load}\nload_recipe('configs/{name}.yaml')")
    mistaken = ["train", "configs/vision_language/quickstart.yaml", "--set", "method.betta=1"]
    imports = "from typer.testing import CliRunner\nfrom mmalign.cli import app"
    call = f"{imports}\nassert CliRunner().invoke(app, {mistaken}).exit_code"
    assert "torch" not in loaded_by(call)
