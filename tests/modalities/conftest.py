"""True answers, and recipes that make pairs of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Folders, recipes
from tests.helpers.preparation import FEW, OWN, REALIGN, answers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return answers(tmp_path / "source")


@pytest.fixture
def content(vlm_folders: Folders, source: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe that prepares `made.jsonl`; its own settings come under the name of its kind."""

    def recipe(kind: str, name: str = "made.jsonl", /, **prepare: Any) -> dict[str, Any]:
        settings = {"bdhs": {"bdhs": FEW}, "realign": {"realign": REALIGN}, "own": {"own": OWN}}.get(kind, {})
        section = {
            "kind": kind,
            "source": {"path": str(source)},
            "save_every": 2,
            "keep_torn": True,
            **settings,
            **prepare,
        }
        layout = "realign" if kind == "realign" else "trl"
        model = vlm_folders("llava")
        return recipes.vlm(model, tmp_path / name, tmp_path / "out", prepare=section, data={"format": layout})

    return recipe
