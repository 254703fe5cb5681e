"""Quantized bases: equal to their library's own on the same weights, near bfloat16, in the bytes of a plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign import methods
from mmalign.commands import _plan_memory, preflight
from mmalign.commands._bench_meters import LiveBytes
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import build_policy
from mmalign.config.methods import find_method
from mmalign.families import quantize
from mmalign.families.lora import adapter_layers
from mmalign.modalities import loading
from mmalign.policy import Policy
from mmalign.reading.weights import plain_tensors
from mmalign.rng import KeyedRNG
from tests.commands.test_export import adapted
from tests.helpers import Folders, first_fast, image_batches, recipes, response_batches, vlm_models
from tests.helpers.loading import load_diffusion, load_vlm

CPU = torch.device("cpu")
pytest.importorskip("torchao")


def recipe_of(model: Path, tmp_path: Path, vlm: bool, **options: Any) -> Any:
    of = {"model": {"tune": "lora", "lora": {"rank": 2}, **options}, "train": {"precision": "bfloat16"}}
    return load_recipe((recipes.vlm if vlm else recipes.diffusion)(model, tmp_path / "pairs", tmp_path / "run", **of))


def policy_of(recipe: Any) -> Policy[Any]:
    return build_policy(loading.load_model(recipe, CPU), recipe)


def loss_of(policy: Policy[Any], vlm: bool) -> Tensor:
    """Return the mean loss of plain fine-tuning, which depends on the whole prediction from the first update on."""
    name = "response_sft" if vlm else "sft"
    method: Any = methods.find(name)
    config: Any = find_method(name)[1](name=name)
    batch = response_batches.batch(policy.family) if vlm else image_batches.pairs(policy.family)
    (contrast,) = method.contrasts(policy, batch, config, KeyedRNG(0))
    return method.loss(policy, contrast, config).losses.mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["flux", "qwen2_5_vl"])
def test_a_quantized_base(name: str, kind: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    vlm = name != "flux"
    folders: Folders = request.getfixturevalue("vlm_folders" if vlm else "flow_folders")
    recipe = recipe_of(folders(name), tmp_path, vlm, quantize=kind)
    whole, policy = policy_of(recipe_of(folders(name), tmp_path, vlm)), policy_of(recipe)
    # The library's own layer on the same weights
    layers = {
        n: m for n, m in policy.model.named_modules() if type(m) is nn.Linear and len(plain_tensors(m.weight)) > 1
    }
    assert layers and not any("visual" in layer or "lm_head" in layer for layer in layers)
    layer = next(iter(layers))
    own: Any = whole.model.get_submodule(layer)
    quantize_(own, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    for mine, own_tensor in zip(plain_tensors(layers[layer].weight), plain_tensors(own.weight), strict=True):
        assert torch.equal(mine, own_tensor)
    # The loss, and gradients of the adapters alone
    whole = policy_of(recipe_of(folders(name), tmp_path, vlm))
    loss = loss_of(policy, vlm)
    assert loss.item() == pytest.approx(loss_of(whole, vlm).item(), rel=1e-2)
    loss.backward()
    assert all(p.grad is not None for p in policy.trainable())
    # Memory, as planned
    memory = LiveBytes()
    for tensor in (*policy.model.parameters(), *policy.model.buffers()):
        memory.count(tensor)
    planned, _ = _plan_memory._build(recipe, reference_cached=False)
    expected = sum(x.nbytes for p in planned.model.parameters() for x in plain_tensors(p))
    assert memory.live == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_nf4_of_a_vision_language_model(tmp_path: Path) -> None:
    """The library's own bytes, a loss near bfloat16's also after a pass without gradients, and two updates."""
    bnb: Any = pytest.importorskip("bitsandbytes", reason="needs the extra quantize")
    recipe = recipe_of(wide_qwen(tmp_path / "model"), tmp_path, True, quantize="nf4")
    whole, policy = policy_of(recipe_of(tmp_path / "model", tmp_path, True)), policy_of(recipe)
    # The library's own bytes of the same weights
    layers = {n: m for n, m in policy.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers and not any("visual" in layer or "lm_head" in layer for layer in layers)
    for name, layer in layers.items():
        own = bnb.functional.quantize_4bit(whole.model.get_submodule(name).weight.data, quant_type="nf4", blocksize=64)
        assert torch.equal(layer.weight.data.view(-1), own[0].view(-1))
        assert torch.equal(layer.weight.quant_state.absmax, own[1].absmax)
    # Memory, as planned; scales are no parameters
    planned, _ = _plan_memory._build(recipe, reference_cached=False)
    expected = sum(x.nbytes for p in planned.model.parameters() for x in plain_tensors(p))
    held = sum(x.nbytes for x in (*policy.model.parameters(), *policy.model.buffers()))
    assert held + sum(m.weight.quant_state.absmax.nbytes for m in layers.values()) == pytest.approx(expected, rel=0.02)
    # The loss, and gradients of the adapters alone, also after a pass without gradients
    with torch.no_grad():
        expected_loss = loss_of(policy, True).item()
    loss = loss_of(policy, True)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert loss.item() == pytest.approx(loss_of(whole, True).item(), rel=1e-2)
    loss.backward()
    assert all(p.grad is not None for p in policy.trainable())
    first = next(p for name, p in policy.model.named_parameters() if "layers.0" in name and "lora_B" in name)
    assert first.grad.abs().sum() > 0  # through all layers


def wide_qwen(folder: Path) -> Path:
    """Write a Qwen2.5-VL whose layers have sides in multiples of 64, as bitsandbytes packs them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    vision = {**vlm_models.QWEN2_5_VISION, "out_hidden_size": 64}
    for part in vlm_models.qwen2_5_vl({**vlm_models.TEXT, **sizes}, vision):
        part.save_pretrained(folder)
    return folder


def test_kinds_that_are_impossible_are_refused(tiny_flux: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantize: int8 holds weights that no update can change"):
        recipe_of(tiny_flux, tmp_path, False, quantize="int8", tune="full")
    recipe = recipe_of(tiny_flux, tmp_path, False, quantize="int8")
    compiled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": True})})
    with pytest.raises(ValueError, match=r"model\.quantize: int8 does not support train\.compile"):
        preflight._check_quantize(compiled, CPU)


def test_nf4_of_a_pipeline_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ValueError, match=r"model\.quantize: nf4 needs a GPU"):
        quantize.check("nf4", "diffusers", CPU)
    quantize.check("nf4", "transformers", CPU)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs torchao, which is not installed; pip install 'mmalign\[quantize\]'"):
        quantize.check("fp8", "diffusers", CPU)


def test_a_single_file_is_not_quantized() -> None:
    with pytest.raises(ValueError, match=r"model\.quantize: int8 reads weights from a pipeline's folder"):
        quantize.pipeline_options("int8", "unet", torch.bfloat16, single_file=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(["sdxl", "qwen2_5_vl", "flux"]))
def test_exports_hold_the_adapter_and_the_weights_of_the_files(
    name: str, diffusion_folders: Folders, flow_folders: Folders, vlm_folders: Folders, tmp_path: Path
) -> None:
    """A merged weight is that of the base model's files plus the adapter's change, never a quantized one."""
    folder = {"sdxl": diffusion_folders, "flux": flow_folders}.get(name, vlm_folders)(name)
    vlm = name == "qwen2_5_vl"
    family = adapted(loading.load_bare(recipe_of(folder, tmp_path, vlm, quantize="int8"), CPU))
    for form in ("peft", "merged", *([] if vlm else ["diffusers", "comfyui"]), *(["kohya"] if name == "sdxl" else [])):
        (tmp_path / form).mkdir()
        family.export(tmp_path / form, family.network, form, None)
    base, merged = (
        (load_vlm(path).network.model if vlm else load_diffusion(path).network).state_dict()
        for path in (folder, tmp_path / "merged")
    )
    model: Any = family.network.model if vlm else family.network
    changes = {f"{layer}.weight": each.get_delta_weight("default") for layer, each in adapter_layers(model).items()}
    assert changes.keys() <= base.keys() == merged.keys()
    for key, x in base.items():
        if key in changes:
            torch.testing.assert_close(merged[key], x + changes[key], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(merged[key], x)


def test_layers_take_inputs_in_the_dtype_of_the_computation(tiny_flux: Path, tmp_path: Path) -> None:
    """Autocast does not see torchao's layers, and on a GPU norms give them float32."""
    family = loading.load_bare(recipe_of(tiny_flux, tmp_path, False, quantize="int8"), CPU)
    layer: Any = family.network.transformer_blocks[0].attn.to_q
    assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16
