"""Functions that a recipe names: announced before any of their code runs, and every failure is a sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmalign.registry import import_callable, qualified_name, user_function


@dataclass(frozen=True)
class Row:
    location: str = "rows.jsonl: line 3"


def is_text(value: object) -> bool:
    return isinstance(value, str)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a writer of modules in the current folder; each has a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, content: str) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os:system", "is built into Python"),
        ("builtins:eval", "is built into Python"),
        ("builtins:str", "is a class"),
        ("subprocess:Popen", "is a class"),
        ("os:getpid", "is built into Python"),
        ("shutil:which", ""),
        ("shutil:move", "takes other arguments"),
        ("json:__doc__", "is not a function but str"),
        ("sys:path", "is not a function but list"),
        ("signatures:keyword", "takes other arguments"),
        ("signatures:fails", "failed at rows.jsonl: line 3 (ZeroDivisionError: division by zero)"),
        ("signatures:number", "gave 7 at rows.jsonl: line 3"),
        ("leaving:f", "cannot be imported (SystemExit: 0)"),
        ("broken:f", "cannot be imported (SyntaxError: "),
    ],
)
def test_a_name_that_is_no_such_function_ends_in_a_sentence(name: str, reason: str, module: Any) -> None:
    module(
        "signatures",
        "def keyword(pair, *, more): pass\ndef fails(pair): return 1 / 0\ndef number(pair): return 7\n",
    )
    module("leaving", "raise SystemExit(0)")
    module("broken", "def f(:")
    with pytest.raises(ValueError) as raised:
        user_function("prepare.povid.corruptor", name, ["pair"], "text", is_text)(Row())
    assert str(raised.value).startswith(f"prepare.povid.corruptor: {name} ") and reason in str(raised.value)


def test_a_function_keeps_its_name_and_result(module: Any) -> None:
    module("sound", "def change(pair, other): return pair.location + other")
    function = user_function("key", "sound:change", ["pair", "other"], "text", is_text)
    assert function(Row(), "!") == "rows.jsonl: line 3!" and qualified_name(function) == "sound:change"


def test_no_package_runs_before_it_is_announced(module: Any, tmp_path: Path, log_lines: list[str]) -> None:
    module("outer.__init__", "raise RuntimeError('ran')")
    module("outer.inner.__init__", "")
    module("outer.inner.rules", "def f(pair): pass")
    with pytest.raises(ValueError, match="RuntimeError: ran"):
        import_callable("key", "outer.inner.rules:f")
    assert log_lines == [f"key: this recipe runs outer.inner.rules:f from {tmp_path}/outer/inner/rules.py"]
