"""Worked values and laws of advantages, in float64."""

import pytest
import torch

from mmalign.losses.advantages import Scale, advantages, constrained, decoupled, informative, leave_one_out
from tests.helpers.golden import golden

VALUES = golden("objectives")
REWARDS = torch.tensor([[1.2, 0.4, 0.9, -0.3]], dtype=torch.float64)
SECOND = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 1e-12}


def values(name: str) -> torch.Tensor:
    return torch.tensor([VALUES[name]], dtype=torch.float64)


def test_advantages_are_the_releases() -> None:
    """Flow-GRPO's biased and TRL's unbiased standard deviation."""
    torch.testing.assert_close(advantages(REWARDS), values("advantage group, biased std"), **EXACT)
    torch.testing.assert_close(advantages(REWARDS, unbiased=True), values("advantage group, unbiased"), **EXACT)
    torch.testing.assert_close(leave_one_out(REWARDS), values("rloo"), **EXACT)


def test_decoupled_advantages_are_gdpo_s() -> None:
    """The worked values have nothing added to a standard deviation."""
    both = decoupled(torch.stack([REWARDS, SECOND]), torch.ones(2), eps=0.0)
    torch.testing.assert_close(both, values("gdpo before batch norm"), **EXACT)
    torch.testing.assert_close(advantages(both, scale="batch", eps=0.0), values("gdpo"), **EXACT)
    alone = decoupled(torch.stack([REWARDS, torch.full_like(REWARDS, 7.0)]), torch.tensor([0.5, 3.0]))
    assert torch.equal(alone, 0.5 * advantages(REWARDS))  # a judge that tells nothing apart


@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_scale_is_of_all_processes(unbiased: bool) -> None:
    rewards = torch.tensor([[1.0, 2.0], [4.0, 0.0], [7.0, 3.0]])
    mine, other = rewards[:1], rewards[1:]
    sums = iter([torch.tensor([4.0, other.sum()]), (other - rewards.mean()).square().sum()])  # of the other process
    actual = advantages(mine, scale="batch", unbiased=unbiased, total=lambda values: values + next(sums))
    torch.testing.assert_close(actual, advantages(rewards, scale="batch", unbiased=unbiased)[:1])
    expected = torch.tensor([[-0.5, 0.5]]) / (rewards.std(correction=int(unbiased)) + 1e-4)
    torch.testing.assert_close(actual, expected)


def test_batch_scale_is_of_all_weighted_rewards() -> None:
    """Rewards 0, 2 and 1, 5: deviations 1 and 2 of their means, sqrt(14 / 4) of all four; a padding row is not read."""
    rewards = torch.tensor([[0.0, 2.0], [1.0, 5.0], [100.0, 300.0]])
    actual = advantages(rewards, scale="batch", weights=torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(actual[:2], torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]) / (3.5**0.5 + 1e-4))
    assert advantages(rewards, scale="none").tolist() == [[-1, 1], [-2, 2], [-100, 100]]
    nothing = advantages(rewards, scale="batch", weights=torch.zeros(3))
    assert nothing.isfinite().all()


def test_equal_rewards_have_no_advantage() -> None:
    """Equal rewards of 0.1, whose mean in float32 is not 0.1: an ulp over 1e-4 would still be an advantage."""
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1]])
    assert informative(rewards).tolist() == [False, True]
    scales: tuple[Scale, ...] = ("group", "batch", "none")
    for scale in scales:
        result = advantages(rewards, scale=scale)
        assert not result[0].any() and result[1].all()
    assert not leave_one_out(rewards)[0].any()


@pytest.mark.parametrize("clip", [1.0, None])
def test_clip_bounds_both_signs(clip: float | None) -> None:
    result = advantages(REWARDS, clip=clip)[0].tolist()
    free = VALUES["advantage group, biased std"]
    assert result == pytest.approx([max(-1, min(1, x)) for x in free] if clip else free, abs=1e-12)


def test_a_broken_constraint_costs_as_much_as_the_worst() -> None:
    kept = torch.tensor([[False, True, True, True]])
    assert constrained(REWARDS, kept).tolist() == [[-0.3, 0.4, 0.9, -0.3]]
    assert not informative(constrained(REWARDS, ~kept.new_ones(1, 4))).any()
