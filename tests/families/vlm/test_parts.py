"""Adapters of the vision tower and the projector: gradients reach them, and without them the model is the base."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.commands._plan_memory import estimate
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.config import DecodingConfig
from mmalign.families.lora import adapter_layers
from mmalign.families.types import LoraSettings
from mmalign.families.vlm.export import adapter_names
from mmalign.language.tokens import TokenizedResponse
from mmalign.methods import requirements_of
from mmalign.modalities import modality_of
from mmalign.policy import adapters_off
from mmalign.rng import KeyedRNG
from tests.commands.test_export import logits
from tests.families.vlm.test_model import logps, rows
from tests.helpers import Folders, data_files, first_fast, recipes
from tests.helpers.loading import load_vlm
from tests.helpers.vlm_reference import PICTURES

FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "paligemma", "internvl"]
ALL = ["decoder", "vision_tower", "projector"]
BETWEEN = re.compile("projector|connector|merger")


def adapted(folder: Path, targets: list[str]) -> Any:
    family = load_vlm(folder)
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=targets, seed=0))
    return family


def changed(family: Any) -> Any:
    """Give the second matrices numbers, so that outputs and the gradients of both matrices change."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(family.network).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
    return family


def gradients(family: Any) -> dict[str, Tensor]:
    """Return the gradient of every trained weight, for images of two sizes."""
    family.network.zero_grad()
    logps(family, [*rows(family), *rows(family, ("tall", "wide"))]).sum().backward()
    return {name: p.grad for name, p in family.network.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(FAMILIES, 2))
def test_gradients_reach_tower_and_projector(name: str, vlm_folders: Folders) -> None:
    base, family = load_vlm(vlm_folders(name)), changed(adapted(vlm_folders(name), ALL))
    names = set(adapter_layers(family.network))
    assert not any("lm_head" in layer for layer in names)
    outside = [layer for layer in names if not layer.startswith(family._decoder)]
    assert {bool(BETWEEN.search(layer)) for layer in outside} == {True, False} and any(
        layer.startswith(family._decoder) for layer in names
    )
    # The base without adapters, other numbers with them
    responses = rows(family)
    with torch.no_grad(), adapters_off(family.network):
        assert torch.equal(logps(family, responses), logps(base, responses))
    assert (logps(family, responses) - logps(base, responses)).abs().max() > 1e-3
    # A gradient by finite differences, of a weight of the tower and one of the projector
    by_name = gradients(family)
    for between in (True, False):
        layer, p = _largest(family, by_name, between)
        index = int(by_name[layer].abs().argmax())
        total = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                p.view(-1)[index] += step
                total.append(logps(family, [*rows(family), *rows(family, ("tall", "wide"))]).sum().item())
                p.view(-1)[index] -= step
        slope = (total[0] - total[1]) / 2e-3
        assert by_name[layer].flatten()[index].item() == pytest.approx(slope, rel=0.02)  # float32
    # Recomputed activations give the same gradients
    family.network.train()
    family.enable_gradient_checkpointing()
    for layer, x in gradients(family).items():
        torch.testing.assert_close(x, by_name[layer], rtol=1e-3, atol=1e-4)


def _largest(family: Any, by_name: dict[str, Tensor], between: bool) -> tuple[str, torch.nn.Parameter]:
    """Return the trained weight of tower or projector with the largest gradient."""
    of_part = {
        name: x
        for name, x in by_name.items()
        if not name.startswith(family._decoder) and bool(BETWEEN.search(name)) == between
    }
    name = max(of_part, key=lambda name: of_part[name].abs().max().item())
    assert of_part[name].abs().max() > 0
    return name, dict(family.network.named_parameters())[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_forms_have_the_adapted_tower(name: str, vlm_folders: Folders, tmp_path: Path) -> None:
    family = changed(adapted(vlm_folders(name), ["vision_tower", "projector"]))
    processor = AutoProcessor.from_pretrained(vlm_folders(name))
    wanted, plain = (
        logits(family.network.model, processor),
        logits(load_vlm(vlm_folders(name)).network.model, processor),
    )
    assert not torch.allclose(wanted, plain, rtol=1e-3)
    for form, loader in (("peft", AutoPeftModel), ("merged", AutoModelForImageTextToText)):
        (tmp_path / form).mkdir()
        family.export(tmp_path / form, family.network, form, None)
        model = loader.from_pretrained(tmp_path / form)
        torch.testing.assert_close(logits(model, processor), wanted, rtol=1e-4, atol=1e-5)
    other = load_vlm(vlm_folders(name))
    assert other.adapts_images([], str(tmp_path / "peft"))
    other.load_trained(tmp_path / "peft")
    assert torch.equal(logps(other, rows(other)), logps(family, rows(family)))


def test_answers_see_the_adapted_tower(vlm_folders: Folders) -> None:
    """Features that were encoded once give each network its own answer."""
    family = changed(adapted(vlm_folders("llava"), ["vision_tower", "projector"]))
    for layer in adapter_layers(family.network).values():
        layer.lora_B["default"].weight.data *= 20
    (row, *_) = rows(family)
    views = {"wide": family.processor.preprocess_image(PICTURES["wide"])}
    features = family.encode_images(views)
    decoding = DecodingConfig(max_new_tokens=8)

    def answer(net: Any, features: Any) -> str:
        prompt = TokenizedResponse(row.ids[: row.start], row.start, row.images)
        return family.generate(net, [prompt], features, decoding, rows=[0], rng=KeyedRNG(0))[0].text

    trained = answer(family.network, features)
    with adapters_off(family.network):
        off = answer(family.network, features)
    base = load_vlm(vlm_folders("llava"))
    assert off == answer(base.network, base.encode_images(views)) != trained


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (["vision_tower.q_proj"], {"vision_tower:q_proj"}),
        (["projector"], {"multi_modal_projector:linear_1", "multi_modal_projector:linear_2"}),
        (["q_proj", "projector.linear_2"], {"language_model:q_proj", "multi_modal_projector:linear_2"}),
    ],
)
def test_targets(targets: list[str], ends: set[str], vlm_folders: Folders) -> None:
    names = adapter_layers(adapted(vlm_folders("llava"), targets).network)
    assert {f"{name.split('.')[2]}:{name.rpartition('.')[2]}" for name in names} == ends


def test_unknown_layers_of_a_part(vlm_folders: Folders) -> None:
    with pytest.raises(
        ValueError, match=r"no linear layer of the vision_tower of a Llava.* ends in qkv; expected one of fc1"
    ):
        adapted(vlm_folders("llava"), ["vision_tower.qkv"])


@pytest.mark.parametrize("name", first_fast(["qwen2_5_vl", "llava"]))
def test_a_run(name: str, vlm_folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Features are not cached, reference scores are, and the first loss is ln 2."""
    data = data_files.response_pairs(tmp_path / "rows")
    model = {"lora": {"rank": 2, "targets": ALL}}
    options = {"steps": 2, "gradient_checkpointing": True}
    content = recipes.vlm(vlm_folders(name), data, tmp_path / "output", model=model, train=options)
    recipe = load_recipe(content)
    with caplog.at_level("INFO"):
        history = train(recipe).history
    assert "image features are not cached" in caplog.text
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and history[1]["loss"] != history[0]["loss"]
    kinds = {path.name for path in (tmp_path / "output" / "cache").iterdir()}
    assert "features" not in kinds and kinds
    splits = modality_of(recipe).open_pairs(recipe, requirements_of(recipe.method))
    memory = estimate(recipe, splits, on_card=True)
    assert not memory.example.leaving and "features" not in memory.example.cache_bytes


def test_names_of_a_pickled_adapter_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"layer.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        adapter_names(str(tmp_path))
