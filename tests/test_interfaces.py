"""Recipe sections are told apart in mmalign/modalities/ alone, and judges offer what they state."""

import ast
from pathlib import Path

import pytest

import mmalign
from mmalign import config, rewards
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import SECTIONS, Section
from mmalign.config.methods import METHODS
from mmalign.modalities import modality_of

PACKAGE = Path(mmalign.__file__).parent
RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*_*/*.yaml"))
NAMES = {name for name, item in vars(config).items() if isinstance(item, type) and issubclass(item, Section)}


def section_checks(tree: ast.AST) -> list[ast.Call]:
    """The calls of `isinstance` with a class of a recipe's sections."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and NAMES & {name.split(".")[-1] for name in ast.unparse(node.args[1]).replace("|", " ").strip("()").split()}
    ]


def test_section_checks_are_found() -> None:
    source = "isinstance(a, EvaluateImages); isinstance(b, config.ImageData | config.ResponseData); isinstance(c, str)"
    assert len(section_checks(ast.parse(source))) == 2


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sections_are_told_apart_in_modalities_alone(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] not in ("config", "modalities"):
        calls = section_checks(ast.parse(path.read_text(encoding="utf-8")))
        assert not [f"line {call.lineno}: {ast.unparse(call)}" for call in calls]


def test_every_modality_has_an_object() -> None:
    assert METHODS.keys() == SECTIONS.keys()
    examples = {modality_of(load_recipe(path)).example_evaluation for path in RECIPES}
    assert len(examples) == len(SECTIONS)


@pytest.mark.parametrize("name", rewards.names())
def test_a_judge_states_what_its_file_has(name: str) -> None:
    module = rewards.reward_module(name)
    names = vars(module)
    assert module.Config.of_images == ({"check", "load"} <= names.keys())
    assert module.Config.of_responses == ({"check_responses", "load_responses"} <= names.keys())
