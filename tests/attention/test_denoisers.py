"""Denoisers of every family with our backends: the values and gradients of diffusers' own attention."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from torch import Tensor, nn

from mmalign.attention import BACKENDS, denoisers
from mmalign.attention.choice import SelectedBackend
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family
from mmalign.families.types import Conditioning, Loading, LoraSettings
from tests.helpers import Folders, first_fast, flow_models
from tests.helpers.loading import load_diffusion
from tests.helpers.xformers_kernel import Kernel

UNETS = ["tiny_sd15", "tiny_sd2", "tiny_sdxl"]
SIDE = 32  # Sana takes multiples of 32 alone
SIZES = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)


@pytest.fixture(params=first_fast([*UNETS, *flow_models.BUILDERS]))
def family(request: pytest.FixtureRequest, flow_folders: Folders) -> TextToImage:
    name = request.param
    result = load_diffusion(request.getfixturevalue(name) if name in UNETS else flow_folders(name))
    torch.manual_seed(1)
    for weight in result.network.parameters():  # none begins at zero, where its layer would not matter
        weight.data.add_(0.05 * torch.randn_like(weight))
    return result


class Counting:
    """Backend that counts its calls."""

    def __init__(self, name: str) -> None:
        self.run, self.calls = BACKENDS[name], 0

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        self.calls += 1
        return self.run(*args, **more)


def given(family: TextToImage) -> tuple[Tensor, Tensor, Conditioning]:
    """Noisy latents, their times, and the conditioning of two prompts, one much longer than the other."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = flow_models.conditioning(family, ["a red fox in the long grass", "a hen"], SIDE, SIDE)
    return family.encode_images(images).mean, torch.tensor([0.3, 0.9]), family.condition(text, SIZES)


def answer(family: TextToImage, net: nn.Module) -> tuple[Tensor, Tensor]:
    """The network's answer, and its gradient to all of its weights."""
    weights = [p.requires_grad_() for p in net.parameters()]
    out = family.predict(net, *given(family))
    grads = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
    return out.detach(), torch.cat([g.flatten() for g in grads if g is not None])


# float32: the reference adds in another order, and small gradients are differences of large ones.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "dense"])
def test_every_family_is_what_it_was(family: TextToImage, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, grad = answer(family, family.network)
    counting = Counting(name)
    monkeypatch.setitem(BACKENDS, name, counting)
    denoisers.install(family.network, name)
    actual, our_grad = answer(family, family.network)
    assert counting.calls == len(softmax_attention(family.network))
    torch.testing.assert_close(actual, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))
    assert (our_grad - grad).norm() < 1e-5 * grad.norm()


@pytest.mark.slow
def test_every_family_calls_xformers_as_its_kernels_need(family: TextToImage, kernel: Kernel) -> None:
    """Shapes, strides, dtypes and masks are checked by the stand-in; here the answer, recomputed for the gradient."""
    stock, grad = answer(family, family.network)
    denoisers.install(family.network, "xformers")
    family.enable_gradient_checkpointing()
    actual, our_grad = answer(family, family.network.train())
    assert len(kernel.calls) >= len(softmax_attention(family.network))
    assert {call.query.shape[-1] for call in kernel.calls} == denoisers.head_sizes(family.network)
    torch.testing.assert_close(actual, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))
    assert (our_grad - grad).norm() < 1e-5 * grad.norm()


def softmax_attention(net: nn.Module) -> list[nn.Module]:
    """The modules that attend, but for Sana's linear attention."""
    linear = "SanaLinearAttnProcessor2_0"
    result = [m for m in net.modules() if type(m).__name__.endswith("Attention")]
    return [m for m in result if type(getattr(m, "processor", None)).__name__ != linear]


def test_a_copy_attends_as_its_original(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_diffusion(tiny_sd15)
    assert denoisers.installed(family.network) is None
    denoisers.install(family.network, "dense")
    monkeypatch.setitem(BACKENDS, "dense", counting := Counting("dense"))
    twin = family.frozen_copy()
    assert denoisers.installed(twin) == "dense"
    family.predict(twin, *given(family))
    assert counting.calls == len(softmax_attention(twin))


@pytest.mark.parametrize("builder", ["sd3", "flux"])
def test_a_trained_model_attends_as_its_base(
    builder: str, flow_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_diffusion(flow_folders(builder))
    denoisers.install(family.network, "dense")
    family.save(tmp_path / "model", family.network)
    monkeypatch.setitem(BACKENDS, "dense", counting := Counting("dense"))
    net = family.load_trained(tmp_path / "model")
    assert net is not family.network
    family.predict(net, *given(family))
    assert counting.calls == len(softmax_attention(net))
    assert denoisers.installed(net) == "dense"


def test_adapters_learn_as_before(tiny_sdxl: Path) -> None:
    results = []
    for backend in (None, "dense"):
        family = load_diffusion(tiny_sdxl)
        family.add_lora(LoraSettings(rank=2, alpha=2.0, targets=family.default_lora_targets, seed=0))
        if backend is not None:
            denoisers.install(family.network, backend)
        weights = [p for p in family.network.parameters() if p.requires_grad]
        out = family.predict(family.network, *given(family))
        results.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), weights)]))
    largest = results[0].abs().max().item()
    assert largest > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6 * largest)


def test_half_precision_is_that_of_autocast(flow_folders: Folders) -> None:
    """With float32 weights under autocast, norms leave queries in float32 beside values in bfloat16."""
    family = load_family(str(flow_folders("sd3")), Loading(torch.device("cpu"), half=torch.bfloat16))
    x_t, t, cond = given(family)
    with torch.no_grad():
        stock = family.predict(family.network, x_t, t, cond)
        denoisers.install(family.network, "dense")
        actual = family.predict(family.network, x_t, t, cond)
    torch.testing.assert_close(actual.float(), stock.float(), rtol=0.05, atol=0.05)  # of bfloat16's 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast([*UNETS, *flow_models.BUILDERS]))
def test_half_precision_calls_xformers_in_one_dtype(
    name: str, request: pytest.FixtureRequest, flow_folders: Folders, kernel: Kernel
) -> None:
    """Of all families in bfloat16 under autocast: each call is compared with the formula, to one rounding."""
    folder = request.getfixturevalue(name) if name in UNETS else flow_folders(name)
    family = load_family(str(folder), Loading(torch.device("cpu"), half=torch.bfloat16, network_half=True))
    family.unfreeze()
    denoisers.install(family.network, "xformers")
    family.predict(family.network, *given(family)).sum().backward()
    assert {call.query.dtype for call in kernel.calls} == {torch.bfloat16}


@pytest.mark.slow
def test_heads_are_measured(family: TextToImage) -> None:
    assert denoisers.head_sizes(family.network) <= {2, 4, 8}
    assert denoisers.head_sizes(family.network)


class Odd(nn.Module):
    """Attention in a way that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = object()


def test_attention_that_is_not_known_is_an_error_that_names_it(tiny_sd15: Path) -> None:
    net: Any = copy.deepcopy(load_diffusion(tiny_sd15).network)
    place = "mid_block.attentions.0.transformer_blocks.0.attn1"
    net.get_submodule(place).set_processor(attention_processor.AttnProcessor())
    with pytest.raises(ValueError, match=rf"{place} \(Attention with AttnProcessor\) and 0 more have"):
        denoisers.install(net, "dense")
    with pytest.raises(ValueError, match=r"odd \(Odd with object\) and 0 more"):
        denoisers.install(nn.ModuleDict({"odd": Odd()}), "dense")
    with pytest.raises(ValueError, match="own of this ModuleDict is a MultiheadAttention"):
        denoisers.install(nn.ModuleDict({"own": nn.MultiheadAttention(8, 2)}), "dense")
    with pytest.raises(ValueError, match="this Linear: it has no attention; use sdpa"):
        denoisers.install(nn.Linear(2, 2), "dense")


def test_auto_falls_back_on_attention_that_is_not_known(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown processor, where xformers could run: `auto` takes PyTorch's and says why, `xformers` refuses."""
    family = load_diffusion(tiny_sd15)
    family.network.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(
        attention_processor.AttnProcessor()
    )
    monkeypatch.setattr("mmalign.families.diffusion.pipeline.select_backend", lambda *_: SelectedBackend("xformers"))
    choice = family.use_attention("auto")
    assert choice.backend == "sdpa" and "attn1 (Attention with AttnProcessor)" in str(choice)
    assert denoisers.installed(family.network) is None
    with pytest.raises(ValueError, match="attn1"):
        family.use_attention("xformers")
