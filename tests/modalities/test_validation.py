"""Benchmarks on the validation split: the place of the networks."""

from types import SimpleNamespace
from typing import Any

from torch import nn

from mmalign.modalities.validation import move_beside_family
from mmalign.policy import FrozenCopy, Policy


def test_policy_and_reference_follow_an_offloaded_family() -> None:
    """With `model.offload` a trained copy stays where the family was loaded, until it is used."""
    family: Any = SimpleNamespace(network=nn.Linear(1, 1, device="meta"))
    trained, copy = nn.Linear(1, 1), nn.Linear(1, 1)
    move_beside_family(Policy(family, trained, trained, FrozenCopy(copy)))
    assert trained.weight.is_meta and copy.weight.is_meta
