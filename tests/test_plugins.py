"""Parts from outside, as docs/extending.md shows them: each is run, announced first, and refused in a sentence."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import mmalign
from mmalign.commands.load_recipe import dump_recipe, load_recipe, recipe_class
from mmalign.methods import find
from mmalign.methods._pair_loss import bound_loss
from mmalign.registry import import_class, user_function
from mmalign.rewards import load_reward_model
from tests.helpers import recipes
from tests.helpers.data_files import pick_a_pic

PAGE = Path(mmalign.__file__).parents[1] / "docs" / "extending.md"

if not PAGE.is_file():
    pytest.skip("no checkout: the installed package is under test", allow_module_level=True)

BLOCK = re.compile(r"^```(python|yaml)\n# (my_\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {(match[1], match[2]): match[3] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with the page's modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (import_class, recipe_class):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("my_", "broken_parts"))]:
        monkeypatch.delitem(sys.modules, name)
    for (language, name), text in BLOCKS.items():
        if language == "python":
            Path(name).write_text(text)
    return tmp_path


def section(module: str) -> Any:
    """Return the page's section of a recipe for a module."""
    return yaml.safe_load(BLOCKS["yaml", module])


def announced(lines: list[str], key: str, name: str) -> bool:
    return any(re.match(rf"{key}: this recipe runs {name} from .*my_\w+\.py$", line) for line in lines)


def test_loss_from_outside(folder: Path, log_lines: list[str], tiny_sd15: Path) -> None:
    recipe: Any = load_recipe(
        recipes.diffusion(tiny_sd15, Path("pairs.parquet"), Path("out"), **section("my_losses.py"))
    )
    assert announced(log_lines, "loss", "my_losses:Offset")
    assert recipe.method.loss.offset == 0.3
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    from mmalign.losses.pairwise import Pair

    scores = Pair(torch.tensor([1.0]), torch.tensor([0.0])), Pair(torch.tensor([0.0]), torch.tensor([0.0]))
    # z = 2: -log sigma(2 - 0.3)
    assert bound_loss(recipe.method.loss, 2.0)(*scores).item() == pytest.approx(0.167786, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["my_losses.py", "my_methods.py"])
def test_training_with_parts_from_outside(folder: Path, tiny_sd15: Path, module: str) -> None:
    from mmalign.commands.train import train

    recipe = recipes.diffusion_in(tiny_sd15, folder / "run", train={"steps": 2}, **section(module))
    trained = train(load_recipe(recipe))
    assert trained.steps == 2 and (trained.folder / "model_index.json").is_file()
    again = load_recipe(folder / "run" / "output")  # a run's folder
    assert again.method.name == recipe["method"]["name"]


def test_method_from_outside(folder: Path, log_lines: list[str], tiny_sd15: Path) -> None:
    recipe: Any = load_recipe(recipes.diffusion(tiny_sd15, Path("x.parquet"), Path("out"), **section("my_methods.py")))
    assert announced(log_lines, "method.name", "my_methods:Margin")
    method = find("my_methods:Margin")
    assert not method.requirements(recipe.method).reference and recipe.method.margin == 0.05


def test_reward_model_from_outside(folder: Path, log_lines: list[str], tiny_sd15: Path) -> None:
    recipe: Any = load_recipe(recipes.diffusion(tiny_sd15, Path("x.parquet"), Path("out"), **section("my_rewards.py")))
    reward = recipe.evaluate.reward
    model = load_reward_model(reward.name, reward.path, **reward.options)
    assert announced(log_lines, "reward", "my_rewards:Brightness")
    scores = model([Image.new("RGB", (8, 8), (51, 51, 51)), Image.new("RGB", (8, 8), "white")], ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([0.04, 1.0]))  # (51 / 255) ** 2


@pytest.mark.slow
def test_family_from_outside(folder: Path, log_lines: list[str], tiny_sd15: Path) -> None:
    """Train a checkpoint whose class no adapter knows; without the adapter it is refused."""
    from mmalign.commands.train import train

    model = shutil.copytree(tiny_sd15, folder / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    recipe = recipes.diffusion_in(model, folder / "run", train={"steps": 1})
    with pytest.raises(ValueError, match="is a MyPipeline"):
        train(load_recipe(recipe))
    recipe["model"]["family"] = section("my_families.py")["model"]["family"]
    assert train(load_recipe(recipe)).steps == 1
    assert announced(log_lines, "model.family", "my_families:load")


def test_masker_from_outside(folder: Path, log_lines: list[str]) -> None:
    @dataclass(frozen=True)
    class Pair:
        location: str
        chosen: str

    mask = user_function(
        "prepare.realign.masker", "my_rules:mask", ["pair"], "text", lambda text: isinstance(text, str)
    )
    assert mask(Pair("rows.json: line 1", "A dog runs.")).startswith("A dog [")
    assert announced(log_lines, "prepare.realign.masker", "my_rules:mask")


BROKEN = """
from mmalign.config import MethodConfig
from mmalign.config.losses import PairLossConfig
from mmalign.rewards import JudgeConfig

class Nowhere(MethodConfig):
    pass

class Alone(MethodConfig):
    modality = "text_to_image"

class Options(JudgeConfig):
    pass

class Typed(PairLossConfig):
    function = "broken_parts:none"
    clip: float
"""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "os:system"}, "method.name: os:system is not a class derived from .*MethodConfig"),
        ({"name": "broken_parts:Options"}, "method.name: broken_parts:Options is not a class derived from"),
        ({"name": "broken_parts:Nowhere"}, "method.name: broken_parts:Nowhere has the modality ''"),
        ({"name": "broken_parts:Missing"}, "method.name: broken_parts:Missing cannot be imported"),
        ({"name": "no_such_module:X"}, "method.name: no_such_module:X cannot be imported"),
        ({"name": ":X"}, "method.name: ':X' is not a class"),
        (
            {"name": "diffusion_dpo", "loss": "broken_parts:Alone"},
            "method.loss: .*not a class derived from .*PairLossC",
        ),
        ({"name": "diffusion_dpo", "loss": {"name": "broken_parts:Typed", "clip": "x"}}, "method.loss: .*clip"),
        ({"name": "diffusion_dpo", "loss": {"name": "broken_parts:Typed", "clap": 1.0}}, "method.loss: .*clap"),
    ],
)
def test_what_is_no_part_ends_in_a_sentence(folder: Path, method: dict[str, Any], expected: str) -> None:
    (folder / "broken_parts.py").write_text(BROKEN)
    pick_a_pic(folder / "pairs.parquet")
    with pytest.raises(ValueError, match=expected):
        load_recipe(recipes.diffusion(Path("models/tiny_sd"), folder / "pairs.parquet", folder / "out", method=method))


def test_functions_that_are_missing_beside_a_class(folder: Path) -> None:
    (folder / "broken_parts.py").write_text(BROKEN)
    with pytest.raises(ValueError, match="has no requirements and no contrasts and no loss beside it"):
        find("broken_parts:Alone")
    with pytest.raises(ValueError, match="has no load beside it"):
        load_reward_model("broken_parts:Options", "none")
