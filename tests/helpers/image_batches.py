"""Batches of pairs of images for tests of methods: random latents, and policies of tiny networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.draws import Draws
from mmalign.encode import EncodedPairs
from mmalign.families import Conditioning, Moments, TextToImage
from mmalign.methods import Step
from mmalign.policy import FrozenCopy, Policy

DRAWS = Draws(seed=5, epoch=2)
ROWS = [11, 2**62 + 3, 7, 12345]
PROMPTS = {11: "a red fox", 2**62 + 3: "a hen", 7: "two owls", 12345: "grass"}
OF_REJECTED = {11: "a dog", 2**62 + 3: "two hens", 7: "an owl", 12345: "moss"}


def pairs(family: TextToImage, rows: Sequence[int] = ROWS, std: float = 0.1) -> EncodedPairs:
    """Pairs whose latents, prompts and sizes depend on the row's id alone."""
    sides = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in rows]
    mean = torch.stack(sides, dim=1).flatten(0, 1)
    sizes = torch.tensor([[16.0 + row % 9, 16, 0, row % 5, 16, 16] for row in rows]).repeat(2, 1)
    text, second = (
        Conditioning.cat([family.encode_prompts([some[row]]) for row in rows]) for some in (PROMPTS, OF_REJECTED)
    )
    moments = Moments(mean, torch.full_like(mean, std))
    return EncodedPairs(list(rows), moments, text, family.unconditional(), sizes, torch.ones(len(rows)), second)


def swapped(batch: EncodedPairs) -> EncodedPairs:
    """The chosen and the rejected sides exchanged; only latents without spread are the same images then."""
    other = [*range(len(batch.rows), 2 * len(batch.rows)), *range(len(batch.rows))]
    latents = Moments(batch.latents.mean[other], batch.latents.std[other])
    return replace(batch, latents=latents, sizes=batch.sizes[other])


def frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False).eval()


def full(family: TextToImage, moved: float = 0.0) -> Policy:
    """Full fine-tuning against a frozen copy; `moved` is the size of random changes of the policy since."""
    reference = FrozenCopy(frozen(family.network))
    net = family.network.requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(moved * torch.randn(p.shape, generator=g))
    return Policy(family, net, net, reference)


def run(method: Any, policy: Policy, batch: EncodedPairs, config: Any, draws: Draws = DRAWS) -> Step:
    with torch.no_grad():
        (contrast,) = method.contrasts(policy, batch, config, draws)
    step: Step = method.loss(policy, contrast, config)
    return step


def gradient(policy: Policy, step: Step) -> Tensor:
    """Of the weighted sum of the losses, as the loop takes it; all parameters in one vector."""
    policy.model.zero_grad()
    (step.losses * step.weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
