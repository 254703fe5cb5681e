"""Implicit reward accuracy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mmalign.evaluation.benchmarks import implicit_reward
from mmalign.policy import FrozenCopy, Policy, Scores
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Batch:
    """Scores of a base model, and how much the trained one adds to them; [B] each."""

    chosen: Tensor
    rejected: Tensor
    chosen_gain: Tensor
    rejected_gain: Tensor
    weights: Tensor
    rows: list[int]


BASE, TRAINED = nn.Identity(), nn.Identity()
POLICY = Policy(cast(Any, None), TRAINED, TRAINED, FrozenCopy(BASE))
# Right, wrong, a tie, which is half right, and a row of padding that would be right.
BATCH = Batch(
    chosen=torch.tensor([-1.0, -1.0, -1.0, -1.0]),
    rejected=torch.tensor([-5.0, -0.5, -2.0, -2.0]),
    chosen_gain=torch.tensor([0.5, 0.25, 0.0, 1.0]),
    rejected_gain=torch.tensor([-0.5, 0.5, 0.0, 0.0]),
    weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    rows=[4, 7, 5, 4],
)

GROUPS = {4: "a", 7: "b", 5: "a"}


def score(batch: Batch, rng: KeyedRNG, index: int) -> Callable[[nn.Module], Scores]:
    def run(net: nn.Module) -> Scores:
        gained = float(net is TRAINED)
        return {
            "chosen": batch.chosen + gained * batch.chosen_gain,
            "rejected": batch.rejected + gained * batch.rejected_gain,
        }

    return run


def test_implicit_accuracy_by_hand() -> None:
    """A pair is right if its margin exceeds the base model's, not if it is above 0."""
    result = implicit_reward.accuracy(POLICY, [BATCH], score, groups=GROUPS, num_noise_samples=2, seed=0)
    assert (result.outcomes, result.groups, result.ties) == ((1.0, 0.0, 0.5), ("a", "b", "a"), 1 / 3)
    assert result.chosen_gain == pytest.approx(0.25) and result.rejected_gain == pytest.approx(0.0)
    assert result.as_dict()["accuracy"]["estimate"] == pytest.approx(1 / 2)


def test_implicit_accuracy_refuses_no_pairs() -> None:
    with pytest.raises(ValueError, match="the validation split has no pair to score"):
        implicit_reward.accuracy(POLICY, list[Any](), score, groups=GROUPS, num_noise_samples=1, seed=0)
