"""Variables are named by nouns: words that say nothing of a value stay in comprehensions of a line or two."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("mmalign", "tests") for path in (ROOT / folder).rglob("*.py"))
WORDS = {"found", "one", "some", "told", "ours", "theirs"}


def wordless(tree: ast.AST, in_function: bool = False) -> Iterator[str]:
    """Yield the places of parameters, and of a function's variables, that have such a name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            continue
        if isinstance(node, ast.arg) and node.arg in WORDS:
            yield f"line {node.lineno}: {node.arg}"
        if in_function and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in WORDS:
            yield f"line {node.lineno}: {node.id}"
        yield from wordless(node, in_function or isinstance(node, ast.FunctionDef | ast.Lambda))


def test_such_names_are_seen() -> None:
    source = (
        "def f(one):\n    found, x = 1, [some for some in one]\n    for told in x: pass\nclass C:\n    one: str = ''"
    )
    assert list(wordless(ast.parse(source))) == ["line 1: one", "line 2: found", "line 3: told"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_are_nouns(path: Path) -> None:
    assert not list(wordless(ast.parse(path.read_text(encoding="utf-8"))))
