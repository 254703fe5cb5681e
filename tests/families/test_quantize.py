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
from mmalign.modalities import loading
from mmalign.policy import Policy
from mmalign.reading.weights import plain_tensors
from mmalign.rng import KeyedRNG
from tests.helpers import Folders, image_batches, recipes, response_batches

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
    for mine, theirs in zip(plain_tensors(layers[layer].weight), plain_tensors(own.weight), strict=True):
        assert torch.equal(mine, theirs)
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
