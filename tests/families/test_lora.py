"""Adapters: invisible at first, float32 masters, the same from the same seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.config import Lora
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family, load_vision_language
from mmalign.families.lora import ATTENTION, adapter_layers, add_lora
from mmalign.families.types import Loading, LoraSettings
from mmalign.rng import KeyedRNG
from tests.helpers import Folders

HALF = Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True)
SIZES = torch.tensor([[16.0, 16, 0, 0, 16, 16]])


def load(path: Path, loading: Loading | None = None) -> TextToImage:
    return load_family(str(path), loading or Loading(torch.device("cpu")))


def given(family: TextToImage) -> Any:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([500]), family.condition(family.encode_prompts(["a fox"]), SIZES)


def masters(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("loading", [None, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny_sd15", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_qwen_image"])
def test_outputs_are_unchanged_at_first(model: str, loading: Loading | None, request: pytest.FixtureRequest) -> None:
    family = load(request.getfixturevalue(model), loading)
    net, x = family.network, given(family)
    with torch.no_grad():
        before = family.predict(net, *x)
        add_lora(net, LoraSettings(rank=4, alpha=8.0, targets=ATTENTION, seed=0))
        assert torch.equal(family.predict(net, *x), before)
        first = next(p for name, p in masters(net).items() if "lora_B" in name)
        first.add_(1.0)
        assert not torch.equal(family.predict(net, *x), before)  # and they are in use


def test_only_float32_adapters_train(tiny_sd15: Path) -> None:
    """An update of 1e-5 is lost by bfloat16 weights and kept by these."""
    family = load(tiny_sd15, HALF)
    net = family.network
    add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=ATTENTION, seed=0))
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in masters(net).items())
    frozen = [p for p in net.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen)
    # Two matrices for each of 4 layers in 2 attentions of every transformer block.
    blocks = sum(type(m).__name__ == "BasicTransformerBlock" for m in net.modules())
    assert len(masters(net)) == 2 * 4 * 2 * blocks
    optimizer = torch.optim.SGD(masters(net).values(), lr=1e-5)
    before = {name: p.detach().clone() for name, p in masters(net).items()}
    family.predict(net, *given(family)).float().square().sum().backward()
    optimizer.step()
    moved = [name for name, p in masters(net).items() if not torch.equal(p, before[name])]
    assert moved and all("lora_B" in name for name in moved)  # the zero matrices hide the others at the first step


def test_in_half_precision_an_adapted_layer_keeps_its_input_once(tiny_sd15: Path) -> None:
    """And in half precision: not a float32 copy for every layer that it goes to, and what autocast makes of that."""
    family = load(tiny_sd15, HALF)
    add_lora(family.network, LoraSettings(rank=4, alpha=4.0, targets=ATTENTION, seed=0))
    block = next(m for m in family.network.modules() if type(m).__name__ == "BasicTransformerBlock")
    x = torch.randn(2, 16, block.attn1.to_q.in_features, dtype=torch.bfloat16, requires_grad=True)
    kept = list[torch.Tensor]()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y),
    ):
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            layer(x)
    inputs = {y.untyped_storage()._cdata: y.dtype for y in kept if y.numel() == x.numel()}
    assert inputs == {x.untyped_storage()._cdata: torch.bfloat16}


@pytest.mark.slow
def test_adapters_depend_on_their_seed_only(tiny_sd15: Path) -> None:
    nets = [load(tiny_sd15).network for _ in range(3)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=ATTENTION, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(())  # what happened before must not matter
        state = torch.get_rng_state()
    same, again, other_seed = (masters(net) for net in nets)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert any(not torch.equal(same[name], other_seed[name]) for name in same)


def test_the_scale_is_alpha_over_rank(tiny_sd15: Path) -> None:
    """With x the layer's input, the change is alpha / rank * B A x."""
    net: Any = load(tiny_sd15).network
    add_lora(net, LoraSettings(rank=4, alpha=12.0, targets=["to_q"], seed=0))
    layer = next(m for m in net.modules() if hasattr(m, "lora_A"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, a.shape[1], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x) - layer.base_layer(x), 3.0 * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


def test_targets_that_match_nothing(tiny_sd15: Path) -> None:
    net = load(tiny_sd15).network
    with pytest.raises(
        ValueError, match=r"^model\.lora\.targets: no layer of UNet2DConditionModel ends in to_query, qkv"
    ):
        add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=["to_query", "qkv"], seed=0))
    with pytest.raises(ValueError, match=r"^model\.lora\.targets: no layer of UNet2DConditionModel ends in to_kk; exp"):
        # The name that is there does not hide the other
        add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=["to_q", "to_kk"], seed=0))
    with pytest.raises(ValueError, match=r"^model\.lora\.targets: conv_norm_out cannot be adapted"):
        add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=["conv_norm_out"], seed=0))


def test_dropout_is_of_training_alone(tiny_sd15: Path) -> None:
    """In train mode it follows the key; in eval mode there is none."""
    family = load(tiny_sd15)
    net, x, rng = family.network, given(family), KeyedRNG(0)
    add_lora(net, LoraSettings(rank=4, alpha=4.0, targets=ATTENTION, seed=0, dropout=0.5))
    for name, p in masters(net).items():
        if "lora_B" in name:
            nn.init.constant_(p, 0.1)

    @torch.no_grad()
    def predicted(row: int) -> torch.Tensor:
        rng.seed_globally([row], "dropout")
        return family.predict(net.train(), *x)

    assert torch.equal(predicted(1), predicted(1)) and not torch.equal(predicted(1), predicted(2))
    with torch.no_grad():
        plain = family.predict(net.eval(), *x)
        assert torch.equal(family.predict(net, *x), plain) and not torch.equal(plain, predicted(1))


def test_a_rank_stabilized_scale_is_that_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=["0"])
    layer: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0]
    mine = Lora(rank=16, alpha=8.0, rank_stabilized=True)
    assert mine.scaled_alpha / mine.rank == layer.scaling["default"] == 2.0


def test_all_linear_adapts_every_linear_layer(tiny_sd15: Path) -> None:
    family = load(tiny_sd15)
    number = sum(isinstance(layer, nn.Linear) for layer in family.network.modules())
    family.add_lora(LoraSettings(rank=1, alpha=1.0, targets=family.linear_layers, seed=0))
    assert len(adapter_layers(family.network)) == number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "qwen2_5_vl"])
def test_adapters_are_read_without_rounding(
    name: str, diffusion_folders: Folders, vlm_folders: Folders, tmp_path: Path
) -> None:
    """Also into a network in bfloat16, whose dtype peft gives them."""
    vlm = name == "qwen2_5_vl"
    folder = str((vlm_folders if vlm else diffusion_folders)(name))

    def fresh() -> Any:
        return (load_vision_language if vlm else load_family)(folder, HALF)

    first = fresh()
    first.add_lora(LoraSettings(rank=2, alpha=2.0, targets=first.default_lora_targets, seed=0))
    weights = masters(first.network)
    for x in weights.values():
        nn.init.normal_(x, generator=torch.Generator().manual_seed(0))
    first.save(tmp_path, first.network)
    read, continued = fresh(), fresh()
    read.load_trained(tmp_path)
    continued.continue_adapter(str(tmp_path))
    for family in (read, continued):
        others = dict(family.network.named_parameters())
        assert all(torch.equal(others[key], x) for key, x in weights.items())
    (tmp_path / "peft").mkdir()
    read.export(tmp_path / "peft", read.network, "peft", None)


def test_no_gpu_draws_adapters(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs a process has one, and asks the others for nothing."""
    states = list[int]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda number: states.append(number) or torch.zeros(16))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    before = torch.get_rng_state()
    load(tiny_sd15).add_lora(LoraSettings(rank=4, alpha=8.0, targets=ATTENTION, seed=0))
    assert not states and torch.equal(torch.get_rng_state(), before)
