"""`mmalign explain` and the page of all keys."""

from pathlib import Path

import pytest

import mmalign
from mmalign.commands.explain import explain, list_options, markdown
from mmalign.commands.load_recipe import RENAMED, load_recipe

ROOT = Path(mmalign.__file__).parents[1]


def test_every_key_has_a_meaning() -> None:
    assert [option.path for option in list_options() if not option.meaning] == []


@pytest.mark.parametrize("key", ["train.lr", "lr", "train"])
def test_key_is_found_by_path_ending_or_section(key: str) -> None:
    lines = explain(key)
    assert "train.lr: number, > 0; required" in lines
    assert "  learning rate after the warm-up" in lines


def test_optional_choices_are_named() -> None:
    assert "model.quantize: int8, nf4, fp8; default null" in explain("model.quantize")


def test_methods_with_other_defaults_are_named() -> None:
    lines = explain("method.beta")
    assert "method.beta (spo): number, > 0; default 10.0" in lines
    assert "method.beta (bdhs, dpo, mdpo, online_dpo, povid, realign): number, > 0; default 0.1" in lines


def test_choices_are_listed_with_their_own_keys() -> None:
    lines = explain("method.loss")
    assert any(": dpo, ipo, hinge, robust," in line and line.endswith("; default dpo") for line in lines)
    assert "  robust: fraction of swapped labels" in explain("flip_rate")


@pytest.mark.slow
@pytest.mark.parametrize("old", sorted(RENAMED))
def test_old_name_is_answered_with_the_new(old: str) -> None:
    assert explain(old)[0] == f"{old} is now called {RENAMED[old]}"
    assert len(explain(old)) > 1


@pytest.mark.parametrize(("key", "near"), [("train.lrr", "'train.lr'"), ("warmup_step", "'warmup_steps'")])
def test_unknown_key_is_answered_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no recipe has a key '{key}'; did you mean {near}"):
        explain(key)


def test_page_of_all_keys_is_up_to_date() -> None:
    page = ROOT / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run: mmalign explain --markdown > docs/recipes.md"


def test_every_key_of_a_complete_recipe_is_explained() -> None:
    known = {option.path for option in list_options()}
    recipe = load_recipe("dpo_tiny_llava").model_dump()
    for section in ("model", "train", "data", "limits", "gallery"):
        assert {f"{section}.{key}" for key in recipe[section] if key not in ("lora", "guard", "adapter")} <= known
