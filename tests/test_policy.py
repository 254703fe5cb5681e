"""The reference: adapters off is the model as it was, bit for bit, and nothing is left switched."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.diffusion.flow import Flow
from mmalign.families.base import TextToImage
from mmalign.families.loading import load_family
from mmalign.families.lora import ATTENTION, add_lora
from mmalign.families.types import Conditioning, Loading, LoraSettings
from mmalign.policy import AdaptersOff, FrozenCopy, Policy, adapters_off, eval_mode
from tests.helpers.loading import CPU, diffusion_families

family = diffusion_families("tiny_sd15", "tiny_sdxl", "tiny_sd3", "tiny_flux")


@pytest.fixture
def given(family: TextToImage) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(0)
    x_t, sizes = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(2, 1)
    t = torch.tensor([0.2, 0.9] if isinstance(family.schedule, Flow) else [3, 700])
    return x_t, t, family.condition(family.encode_prompts(["a fox", "a hen"]), sizes)


def adapters(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if "lora_" in name}


def train_adapters(family: TextToImage, given: Any, updates: int = 3) -> nn.Module:
    """LoRA on the family's denoiser, moved by real updates; the frozen weights have no gradient."""
    net = family.network
    add_lora(net, LoraSettings(rank=2, alpha=2.0, targets=ATTENTION, seed=0))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(updates):
        family.predict(net, *given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def lora_policy(family: TextToImage, net: nn.Module) -> Policy:
    return Policy(family, net, net, AdaptersOff())


def test_adapters_off_is_the_frozen_copy_bit_for_bit(family: TextToImage, given: Any) -> None:
    frozen = FrozenCopy(copy.deepcopy(family.network))
    net = train_adapters(family, given)
    policy = lora_policy(family, net)

    def run(net: nn.Module) -> Tensor:
        return family.predict(net, *given)

    off = policy.on_reference(run)
    copied = Policy(family, net, net, frozen).on_reference(run)
    assert off is not None and copied is not None
    assert torch.equal(off, copied) and not off.requires_grad
    with torch.no_grad():
        trained = run(net)
    assert (trained - off).abs().max() > 1e-3  # training moved the policy, and the adapters are on again


def test_adapters_off_is_the_frozen_copy_in_half_precision(tiny_sd15: Path) -> None:
    family = load_family(str(tiny_sd15), Loading(CPU.device, half=torch.bfloat16, network_half=True))
    given = torch.randn(1, 4, 8, 8), torch.tensor([3]), family.encode_prompts(["a fox"])
    frozen = copy.deepcopy(family.network)
    net = train_adapters(family, given)
    with torch.no_grad(), adapters_off(net):
        assert torch.equal(family.predict(net, *given), family.predict(frozen, *given))


def test_nothing_is_left_switched(family: TextToImage, given: Any) -> None:
    """After use, after an exception, and after one in another: adapters on, `requires_grad` and gradients as before."""
    net = train_adapters(family, given)
    policy = lora_policy(family, net)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == set(adapters(net)) and len(policy.trainable()) == len(trainable)
    with torch.no_grad():
        before = family.predict(net, *given)

    def fails(net: nn.Module) -> None:
        assert not torch.is_grad_enabled()
        assert {name for name, p in net.named_parameters() if p.requires_grad} == trainable
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        policy.on_reference(fails)
    with torch.no_grad(), adapters_off(net):
        with adapters_off(net):
            inner = family.predict(net, *given)
        assert torch.equal(family.predict(net, *given), inner)  # still off in the outer one
    assert {name for name, p in net.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad():
        assert torch.equal(family.predict(net, *given), before)
    assert torch.is_grad_enabled()


def test_a_network_without_adapters_is_refused(family: TextToImage) -> None:
    policy, name = lora_policy(family, family.network), type(family.network).__name__
    with pytest.raises(ValueError, match=rf"{name} has no adapters to switch off; set model\.tune"):
        policy.on_reference(lambda net: None)


def test_without_a_reference_nothing_runs(family: TextToImage) -> None:
    def never(_: nn.Module) -> None:
        raise AssertionError("a policy without a reference must not run one")

    assert Policy(family, family.network, family.network, None).on_reference(never) is None


def gradients(family: TextToImage, net: nn.Module, given: Any) -> Iterator[Tensor]:
    """Of a loss that asks the reference between the policy's forward and its backward pass."""
    actual = family.predict(net, *given)
    expected = lora_policy(family, net).on_reference(lambda net: family.predict(net, *given))
    assert expected is not None
    (actual - expected + 1).square().mean().backward()
    for parameter in adapters(net).values():
        assert parameter.grad is not None
        yield parameter.grad.clone()
    net.zero_grad()


def test_gradient_checkpointing_recomputes_with_adapters_on(family: TextToImage, given: Any) -> None:
    net: Any = train_adapters(family, given).train()
    plain = list(gradients(family, net, given))
    net.enable_gradient_checkpointing()
    recomputed = list(gradients(family, net, given))
    assert any(g.abs().max() > 1e-3 for g in plain)
    for with_, without in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(with_, without, rtol=1e-5, atol=1e-7)


def test_full_fine_tuning_leaves_its_frozen_copy_alone(family: TextToImage, given: Any) -> None:
    net = family.network
    copied = copy.deepcopy(net).requires_grad_(False).eval()
    policy = Policy(family, net.requires_grad_(True), net, FrozenCopy(copied))
    before = policy.on_reference(lambda net: family.predict(net, *given))
    assert len(policy.trainable()) == len(list(net.parameters()))
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.1)
    family.predict(net, *given).square().mean().backward()
    optimizer.step()
    after = policy.on_reference(lambda net: family.predict(net, *given))
    assert before is not None and after is not None and torch.equal(before, after)
    assert not torch.equal(family.predict(net, *given), after)


def test_eval_mode_restores_the_mode_of_every_part() -> None:
    """Contrasts may be left in the middle of a batch, whose losses need the mode from before."""
    net = nn.Sequential(nn.Dropout(), nn.Dropout())
    net[1].eval()
    with pytest.raises(KeyError), eval_mode(net):
        assert not any(part.training for part in net.modules())
        raise KeyError
    assert [part.training for part in net.modules()] == [True, True, False]
