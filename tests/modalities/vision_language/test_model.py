"""Variables of a chat template that a recipe sets."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.commands import _resume
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.show import show
from mmalign.data.caches.image_features import tokenizer_dependencies
from mmalign.data.formats.responses import open_responses
from mmalign.language.chat import Turn
from mmalign.modalities.loading import load_model
from mmalign.modalities.vision_language.doctor import doctor_inputs
from tests.helpers import Folders, data_files, recipes
from tests.helpers.chat_templates import SWITCHED

CPU = torch.device("cpu")


@pytest.fixture
def content(vlm_folders: Folders, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of a model that thinks unless `enable_thinking` is false."""
    folder = tmp_path / "model"
    shutil.copytree(vlm_folders("qwen2_5_vl"), folder)
    (folder / "chat_template.jinja").write_text(SWITCHED)
    return recipes.vlm(folder, data_files.response_pairs(tmp_path / "rows"), tmp_path / "out")


def test_template_arguments_reach_every_command(content: dict[str, Any]) -> None:
    """The prompt, the caches and the identity of a run depend on them; the doctor reads with them as well."""
    thinking, plain = (
        load_recipe(content, options) for options in ([], ["model.template_arguments.enable_thinking=false"])
    )
    families = [load_model(recipe, CPU) for recipe in (thinking, plain)]
    prompts = [family.processor.template.frame([Turn("user", "What?")]).prompt for family in families]
    assert prompts[0].endswith("<think>\n") and prompts[1].endswith("<think>\n\n</think>\n\n")
    assert tokenizer_dependencies(families[0]) != tokenizer_dependencies(families[1])
    pairs = open_responses("auto", thinking.data.path)
    identities = [
        _resume.identify(recipe, family, pairs, 1) for recipe, family in zip((thinking, plain), families, strict=True)
    ]
    differing = {key for key in identities[1] if identities[1][key] != identities[0].get(key)}
    assert differing == {"model.template_arguments.enable_thinking", "prompts"}
    tokens: Any = doctor_inputs(plain).tokens
    assert tokens.processor.template_arguments == {"enable_thinking": False}
    for recipe, prompt in zip((thinking, plain), prompts, strict=True):
        chosen = show(recipe, number=1).examples[0].sides[0]
        shown = "".join(span.text for span in chosen.text if not span.scored)
        assert prompt.rpartition("assistant")[2] in shown and ("</think>" in shown) == ("</think>" in prompt)


def test_another_chat_template_makes_another_run(content: dict[str, Any]) -> None:
    """Templates change on the Hub while weights stay."""
    recipe = load_recipe(content)
    pairs = open_responses("auto", recipe.data.path)
    template = Path(recipe.model.path) / "chat_template.jinja"
    before = _resume.identify(recipe, load_model(recipe, CPU), pairs, 1)
    assert _resume.identify(recipe, load_model(recipe, CPU), pairs, 1) == before
    template.write_text(SWITCHED.replace("<|im_start|>", "<|im_start|> "))
    after = _resume.identify(recipe, load_model(recipe, CPU), pairs, 1)
    assert {key for key in after if after[key] != before[key]} == {"prompts"}


def test_a_variable_that_the_template_does_not_have_is_refused(content: dict[str, Any]) -> None:
    recipe = load_recipe(content, ["model.template_arguments.enable_thinkin=false"])
    with pytest.raises(ValueError, match=r"model\.template_arguments: .* no variable 'enable_thinkin'; did you mean"):
        load_model(recipe, CPU)
