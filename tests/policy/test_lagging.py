"""Lagging copies: their rules by hand, and the networks that they make of a policy."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.families.base import TextToImage
from mmalign.policy.lagging import LaggingCopy, mixed_share
from tests.helpers.loading import diffusion_families
from tests.helpers.policies import POLICIES

family = diffusion_families("tiny_sd15", "tiny_sd3")


def half(step: int) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ({"every": 512, "mix": 0.6}, {1: 0, 511: 0, 512: 0.6, 513: 0, 1024: 0.6}),  # TR-DPO, as in TRL
        ({"every": 3, "mix": 1.0}, {1: 0, 3: 1, 6: 1, 7: 0}),
        (
            {"every": 1, "mix": 0.5, "ramp": 0.001},
            {1: 0.999, 100: 0.9, 500: 0.5, 700: 0.5},
        ),  # of NFT
        ({"every": 1, "mix": 0.001, "ramp": 0.0075, "flat": 75}, {75: 1, 115: 0.7, 208: 0.0025, 300: 0.001}),
        ({"every": 4, "mix": 0.5, "ramp": 0.1}, {2: 0, 4: 0.6, 8: 0.5}),
    ],
)
def test_shares_by_hand(rule: dict[str, Any], shares: dict[int, float]) -> None:
    rule = {"ramp": None, "flat": 0, **rule}
    assert {step: mixed_share(step, **rule) for step in shares} == pytest.approx(shares)


def test_a_copy_by_hand() -> None:
    """After updates 2 and 4, by 0.6: 0.4 * 1 + 0.6 * 3 = 2.2, and 0.4 * 2.2 + 0.6 * 5 = 3.88."""
    p = nn.Parameter(torch.tensor([1.0]))
    lagging = LaggingCopy([p], partial(mixed_share, every=2, mix=0.6, ramp=None, flat=0))
    seen = []
    for step, value in enumerate([2.0, 3.0, 4.0, 5.0], start=1):
        p.data.fill_(value)
        lagging.update([p], step)
        seen.append(lagging.weights[0].item())
    assert seen == pytest.approx([1.0, 2.2, 2.2, 3.88])


def predicting(family: TextToImage) -> Callable[[nn.Module], Tensor]:
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([3, 700] if "UNet" in type(family.network).__name__ else [0.2, 0.9])
    cond = family.condition(family.encode_prompts(["a fox", "a hen"]), torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2))
    x_t = torch.randn(2, 4, 8, 8, generator=g)
    return lambda net: family.predict(net, x_t, t, cond)


def move(net: nn.Module, scale: float = 0.05) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("tune", POLICIES)
def test_a_moving_reference_is_the_network_with_the_mixed_weights(family: TextToImage, tune: str) -> None:
    """Before the first update it is the base model, bit for bit; the policy is as it was, after an error too."""
    policy, run = POLICIES[tune](family), predicting(family)
    moving = LaggingCopy(policy.trainable(), half)
    base, lagging = policy.on_reference(run), replace(policy, moving=moving)
    first = lagging.on_reference(run)
    assert base is not None and first is not None and torch.equal(first, base)
    mixed = copy.deepcopy(policy.unwrapped)
    move(policy.unwrapped)
    moving.update(policy.trainable(), 1)
    with torch.no_grad():
        actual = run(policy.unwrapped)
        own = {name: p for name, p in mixed.named_parameters() if p.requires_grad}
        for (name, p), start in zip(own.items(), (p.clone() for p in own.values()), strict=True):
            p.copy_(torch.lerp(start, dict(policy.unwrapped.named_parameters())[name], 0.5))
        expected = run(mixed)
    second = lagging.on_reference(run)
    assert second is not None and torch.equal(second, expected) and not second.requires_grad
    assert min((second - base).abs().max(), (second - actual).abs().max()) > 1e-4
    with pytest.raises(KeyError):
        lagging.on_reference(lambda net: {}["nothing"])
    kept, again = lagging.against_base().on_reference(run), run(policy.unwrapped)
    assert kept is not None and torch.equal(kept, base) and torch.equal(again, actual)


@pytest.mark.parametrize("tune", POLICIES)
def test_a_reference_that_caught_up_needs_no_run_of_its_own(family: TextToImage, tune: str) -> None:
    """Before the first update, and after the second, which makes it the policy again; a fixed one always does."""
    policy, run, runs = POLICIES[tune](family), predicting(family), list[Tensor]()
    moving = LaggingCopy(policy.trainable(), partial(mixed_share, every=2, mix=1.0, ramp=None, flat=0))
    lagging = replace(policy, moving=moving)

    def counted(net: nn.Module) -> Tensor:
        runs.append(run(net))
        return runs[-1]

    for step, number in enumerate([1, 2, 1]):
        if step:
            move(policy.unwrapped)
            moving.update(policy.trainable(), step)
        runs.clear()
        own, reference = lagging.on_both(counted)
        assert len(runs) == number and reference is not None
        assert torch.equal(own, run(policy.unwrapped)) and torch.equal(own, reference) == (number == 1)
        runs.clear()
        assert policy.on_both(counted)[1] is not None and len(runs) == 2
    # What is not known to be equal is run
    generating = replace(lagging, old=LaggingCopy(policy.trainable(), half))
    runs.clear()
    generating.on_both(counted)
    moving.load([weight.clone() for weight in moving.weights])
    lagging.on_both(counted)
    assert len(runs) == 4


def test_a_moving_reference_between_forward_and_backward_changes_no_gradient(family: TextToImage) -> None:
    policy, run = POLICIES["lora"](family, moved=0.05), predicting(family)
    lagging = replace(policy, moving=LaggingCopy(policy.trainable(), half))
    move(policy.unwrapped)
    gradients = []
    for each in (policy, lagging):
        loss = run(each.unwrapped).square().mean()
        each.on_reference(run)
        loss.backward()
        gradients.append([p.grad.clone() for p in each.trainable() if p.grad is not None])
        each.unwrapped.zero_grad()
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_the_old_policy_and_a_moving_reference_do_not_meet(family: TextToImage) -> None:
    """A reference that is asked while the old policy generates, as DiffusionNFT does."""
    policy, run = POLICIES["lora"](family, moved=0.05), predicting(family)
    with torch.no_grad():
        old = run(policy.unwrapped)
        lagging = replace(policy, old=LaggingCopy(policy.trainable(), half))
        move(policy.unwrapped)
        middle = run(policy.unwrapped)
        lagging = replace(lagging, moving=LaggingCopy(policy.trainable(), half))
        move(policy.unwrapped)
        last = run(policy.unwrapped)
        with policy.as_old():
            assert torch.equal(run(policy.unwrapped), last)
        with lagging.as_old():
            reference = lagging.on_reference(run)
            assert reference is not None and torch.equal(reference, middle)
            assert torch.equal(run(policy.unwrapped), old)
        assert torch.equal(run(policy.unwrapped), last)
