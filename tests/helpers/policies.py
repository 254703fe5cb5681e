"""Policies on tiny families, and one step of a method."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.families.types import LoraSettings
from mmalign.methods import Step
from mmalign.policy import AdaptersOff, FrozenCopy, Policy
from mmalign.rng import KeyedRNG

DRAWS = KeyedRNG(seed=5, epoch=2)


def frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False).eval()


def full(family: Any, moved: float = 0.0) -> Policy[Any]:
    """Set up full fine-tuning against a frozen copy; `moved` scales random changes of the policy's weights."""
    reference = FrozenCopy(frozen(family.network))
    net = family.network.requires_grad_(True)
    policy = Policy(family, net, net, reference)
    return _moved(policy, moved)


def adapted(family: Any, moved: float = 0.0) -> Policy[Any]:
    """Set up LoRA against the model without it; `moved` scales random changes of the adapters."""
    family.add_lora(LoraSettings(rank=2, alpha=4.0, targets=family.default_lora_targets, seed=0))
    policy = Policy(family, family.network, family.network, AdaptersOff())
    return _moved(policy, moved)


POLICIES = {"full": full, "lora": adapted}


def _moved(policy: Policy[Any], scale: float) -> Policy[Any]:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return policy


def run(method: Any, policy: Policy[Any], batch: Any, cfg: Any, rng: KeyedRNG = DRAWS) -> Step:
    """Return the loss of a method's only contrast of a batch."""
    with torch.no_grad():
        (contrast,) = method.contrasts(policy, batch, cfg, rng)
    step: Step = method.loss(policy, contrast, cfg)
    return step


def gradient(policy: Policy[Any], step: Step) -> Tensor:
    """Return the gradient of the weighted sum of the losses, all parameters in one vector."""
    policy.model.zero_grad()
    (step.losses * step.weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
