"""Policy and reference: the trained model, and the frozen model that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from mmalign.policy import sharding
from mmalign.policy.lagging import LaggingCopy

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from mmalign.families.base import Family

R = TypeVar("R")
# Methods use a modality's family interface; `Policy` without a parameter accepts any family.
F = TypeVar("F", bound="Family", default="Family", covariant=True)
Scores = dict[str, Tensor]  # view ("chosen", "rejected", ...) -> [B], float32, higher is better


@dataclass(frozen=True)
class AdaptersOff:
    """Policy without its adapters, as reference: no second copy in memory, exact only if nothing else is trained."""


@dataclass(frozen=True)
class FrozenCopy:
    """Copy of the model from before the first update, as reference."""

    model: nn.Module


Reference = AdaptersOff | FrozenCopy | None


@dataclass(frozen=True)
class Policy(Generic[F]):
    """Trained model of a family, with the reference that its method needs.

    Attributes:
        family: the interface to encode, score and sample with a model of this kind.
        model: the network that `Method.loss` must call; wrapped for distributed training once the loop starts.
        unwrapped: the bare network, for generation, saving, and switching adapters.
        reference: the reference; None for methods without one.
        skeleton: the bare network without weights, if it is sharded; None if every process holds all weights.
        memory: numbers of the run's past that the method's loss reads, by name; the loop changes them in place.
        total: sum of a tensor over all processes, each of which has a batch of its own.
        moving: the trained weights of a reference that follows the policy, which `reference` is at first; None for a
            reference that stays.
        old: the trained weights of the policy that generates, if it lags behind; None for the policy itself.

    Raises:
        ValueError: the reference is the model without its adapters, but other weights are trained and would change it.
    """

    family: F
    model: nn.Module
    unwrapped: nn.Module
    reference: Reference
    skeleton: nn.Module | None = None
    memory: dict[str, float] = field(default_factory=dict)
    total: Callable[[Tensor], Tensor] = lambda values: values
    moving: LaggingCopy | None = None
    old: LaggingCopy | None = None

    def __post_init__(self) -> None:
        outside = trained_outside_adapters(self.unwrapped) if isinstance(self.reference, AdaptersOff) else []
        if outside:
            raise ValueError(
                f"reference: {outside[0]} and {len(outside) - 1} more weights outside the adapters are trained, so the "
                "model without its adapters is not a fixed reference; train only the adapters, or use model.tune: full"
            )

    @torch.no_grad()
    def on_reference(self, run: Callable[[nn.Module], R]) -> R | None:
        """Return the result of `run` on the reference network, without gradients; None without a reference."""
        # A moving reference lends its weights to the policy's network for the run
        if self.moving is not None:
            with self.moving.swapped(self.trainable()):
                return run(self.unwrapped)
        match self.reference:
            case AdaptersOff():
                # The bare network, because a distributed wrapper would wait for gradients that never come
                with adapters_off(self.unwrapped):
                    return run(self.unwrapped)
            case FrozenCopy(model):
                return run(model)
            case None:
                return None

    @torch.no_grad()
    def on_both(self, run: Callable[[nn.Module], R]) -> tuple[R, R | None]:
        """Return the results of `run` on the policy's network and on the reference, without gradients.

        It runs once if a moving reference has just caught up with the policy.
        """
        reference = self.on_reference(run)
        # The network has the weights of the old policy while that generates
        if reference is not None and self.moving is not None and self.moving.caught_up and self.old is None:
            return reference, reference
        return run(self.unwrapped), reference

    def as_old(self) -> AbstractContextManager[None]:
        """Give the policy the weights of the old policy, for a time without gradients; they may be its own."""
        return nullcontext() if self.old is None else self.old.swapped(self.trainable())

    def against_base(self) -> Policy[F]:
        """Return the policy with the reference of its first update, which no update moves."""
        return replace(self, moving=None)

    @property
    def lagging(self) -> dict[str, LaggingCopy]:
        """The copies that every update moves, by their keys in a recipe."""
        copies = {"method.reference": self.moving, "method.old": self.old}
        return {key: copy for key, copy in copies.items() if copy is not None}

    def gathered(self, net: nn.Module) -> AbstractContextManager[None]:
        """Hold all weights of `net`, policy or reference, so that processes may run it unequally often.

        Does nothing if the policy is not sharded.
        """
        return nullcontext() if self.skeleton is None else sharding.gathered(net)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [p for p in self.unwrapped.parameters() if p.requires_grad]


def shard_policy(policy: Policy[F], device: torch.device) -> Policy[F]:
    """Shard the networks of policy and reference over all processes, in place, and return the policy with a skeleton.

    Raises:
        ValueError: the family's network cannot be sharded.
    """
    family, net = policy.family, policy.unwrapped
    skeleton = sharding.skeleton(net)
    for each in (net, *([policy.reference.model] if isinstance(policy.reference, FrozenCopy) else [])):
        sharding.shard(each, family.shard_plan(each), device)
    return replace(policy, skeleton=skeleton)


@contextmanager
def adapters_off(net: nn.Module) -> Iterator[None]:
    """Switch a network's LoRA layers off, and restore them on exit, even after an error.

    Backward needs them on, because activation checkpointing repeats the forward pass.

    Raises:
        ValueError: the network has no adapters.
    """
    layers = list(_adapter_layers(net))
    if not layers:
        raise ValueError(f"reference: {type(net).__name__} has no adapters to switch off; set model.tune to lora")
    # Not the library's switch, which also clears requires_grad of every adapter while the optimizer holds it
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and restore the mode of every part on exit, even after an error."""
    training = [part for part in net.modules() if part.training]
    net.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _adapter_layers(net: nn.Module) -> Iterator[BaseTunerLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in net.modules() if isinstance(module, BaseTunerLayer))


def trained_outside_adapters(net: nn.Module) -> list[str]:
    """Return the names of trained parameters outside adapters, which stay on without them."""
    inside = {
        id(parameter)
        for layer in _adapter_layers(net)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }
    return [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in inside]
