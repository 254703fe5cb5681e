"""DoRA: peft's numbers in float32, no change before the first update in bfloat16, and the same model in every form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import AutoPeftModel, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.commands import _plan_memory
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import build_policy, train
from mmalign.families import dora
from mmalign.families.lora import ADAPTERS, ATTENTION, adapter_layers
from mmalign.families.types import Loading, LoraSettings
from mmalign.modalities import loading
from mmalign.policy import adapters_off
from mmalign.training.optim import build_optimizer
from tests.commands.test_export import logits, predicted
from tests.families.test_lora import HALF, given, load
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_diffusion, load_vlm


def changed(family: Any) -> Any:
    """Return the family with DoRA adapters that change its outputs, at a scale of 6."""
    family.add_lora(LoraSettings(rank=2, alpha=12.0, targets=family.default_lora_targets, seed=0, dora=True))
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(family.network).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
        layer.lora_magnitude_vector["default"].weight.data *= 1.2
    return family


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_those_of_peft(dropout: float) -> None:
    results = []
    for installs in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6, bias=False))
        config = LoraConfig(
            r=2, lora_alpha=6, use_dora=True, target_modules=["0", "1"], init_lora_weights=False, lora_dropout=dropout
        )
        model: Any = get_peft_model(net, config)
        for layer in adapter_layers(model).values():
            layer.lora_magnitude_vector["default"].weight.data *= 1.5
        if installs:
            dora.install(model)
        output = model(torch.randn(3, 6))
        output.square().sum().backward()
        results += [{"output": output, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}]
    of_peft, mine = results
    assert of_peft.keys() == mine.keys() and len(mine) == 1 + 2 * 3
    for name, x in of_peft.items():
        torch.testing.assert_close(mine[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [None, HALF], ids=["float32", "bfloat16"])
def test_the_reference_is_exact_and_the_policy_begins_as_it(half: Loading | None, tiny_sd15: Path) -> None:
    family: Any = load(tiny_sd15, half)
    net, x = family.network, given(family)
    with torch.no_grad():
        before = family.predict(net, *x)
        family.add_lora(LoraSettings(rank=4, alpha=8.0, targets=ATTENTION, seed=0, dora=True))
        assert torch.equal(family.predict(net, *x), before)
        for layer in adapter_layers(net).values():
            layer.lora_magnitude_vector["default"].weight.mul_(1.1)
        assert not torch.equal(family.predict(net, *x), before)
        with adapters_off(net):
            assert torch.equal(family.predict(net, *x), before)


def test_a_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data[0] = 0
    norms = dora.row_norms(layer, torch.randn(1, 3), torch.zeros(2, 1), 1.0)
    change = dora.Magnitudes(norms)(
        torch.ones(1, 3),
        lora_A=nn.Linear(3, 1, bias=False),
        lora_B=_zeros(1, 2),
        scaling=1.0,
        base_layer=layer,
    )
    assert torch.equal(change, torch.zeros(1, 2))


def _zeros(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.slow
def test_forms_of_a_pipeline(tiny_sd15: Path, tmp_path: Path) -> None:
    family = changed(load_diffusion(tiny_sd15))
    wanted = predicted(family, family.network)
    for form in ("diffusers", "peft", "merged"):
        (tmp_path / form).mkdir()
        family.export(tmp_path / form, family.network, form, None)
    others = [load_diffusion(tiny_sd15), load_diffusion(tmp_path / "merged")]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None)
    pipeline.load_lora_weights(load_file(tmp_path / "diffusers" / ADAPTERS))  # the weights alone
    object.__setattr__(others[0], "pipeline", pipeline)
    continued: Any = load_diffusion(tiny_sd15)
    continued.continue_adapter(str(tmp_path / "peft"))
    for other in (*others, continued):
        torch.testing.assert_close(predicted(other, other.network), wanted, rtol=1e-4, atol=1e-5)
    kinds = {type(layer.lora_magnitude_vector["default"]) for layer in adapter_layers(continued.network).values()}
    assert kinds == {dora.Magnitudes}
    for form in ("kohya", "comfyui"):
        with pytest.raises(ValueError, match=r"drops DoRA's magnitudes, .* use merged"):
            family.export(tmp_path, family.network, form, None)


@pytest.mark.slow
def test_forms_of_a_vision_language_model(vlm_folders: Folders, tmp_path: Path) -> None:
    folder = vlm_folders("qwen2_5_vl")
    family = changed(load_vlm(folder))
    wanted = logits(family.network.model, AutoProcessor.from_pretrained(folder))
    for form, loader in (("peft", AutoPeftModel), ("merged", AutoModelForImageTextToText)):
        (tmp_path / form).mkdir()
        family.export(tmp_path / form, family.network, form, None)
        model = loader.from_pretrained(tmp_path / form)
        torch.testing.assert_close(logits(model, AutoProcessor.from_pretrained(folder)), wanted, rtol=1e-4, atol=1e-5)


def test_a_run(vlm_folders: Folders, tmp_path: Path) -> None:
    """It begins at ln 2, trains the magnitudes, and resumes as the same run alone."""
    rows = data_files.response_pairs(tmp_path)
    lora = {"rank": 2, "dora": True}
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "output", model={"lora": lora}, train={"steps": 2})
    history = train(load_recipe(content)).history
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    saved = load_file(tmp_path / "output" / "model" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in saved) == len(saved) // 3
    with pytest.raises(ValueError, match="belongs to another run"):
        train(load_recipe(content, ["model.lora.dora=false", "train.steps=3"]))


def test_magnitudes_have_no_weight_decay() -> None:
    plain, free = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([plain], "adamw", lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, undecayed=[free])
    for p in (plain, free):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(free, torch.ones(2)) and torch.allclose(plain, torch.full((2, 2), 0.95))


def test_convolutions_are_refused(tiny_sd15: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.lora\.dora: .*conv_in is a Conv2d; DoRA adapts linear layers alone"):
        load(tiny_sd15).add_lora(LoraSettings(rank=1, alpha=1.0, targets=["conv_in"], seed=0, dora=True))


def test_a_quantized_base(tiny_flux: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = {"tune": "lora", "lora": {"rank": 2, "dora": True}, "quantize": "int8"}
    content = recipes.diffusion(tiny_flux, tmp_path, tmp_path, model=model, train={"precision": "bfloat16"})
    recipe = load_recipe(content)
    family = loading.load_model(recipe, torch.device("cpu"))
    before = predicted(family, family.network)
    policy = build_policy(family, recipe)
    assert torch.equal(predicted(family, policy.unwrapped), before)
    for kind in ("int8", "nf4"):
        planned, _ = _plan_memory._build(load_recipe(content, [f"model.quantize={kind}"]), reference_cached=False)
        assert sum(p.numel() for p in planned.trainable()) == sum(p.numel() for p in policy.trainable())
