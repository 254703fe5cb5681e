"""Published values and laws of the losses of single outputs and of lists."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.config.base import Choice
from mmalign.config.judged_losses import BCOLossConfig, GroupLossConfig, KTOLossConfig, UnpairedLossConfig
from mmalign.losses import groups, unpaired
from mmalign.losses.groups import Group
from mmalign.methods._pair_loss import bound_loss
from tests.helpers.golden import golden

VALUES = golden("objectives")
GAINS = torch.tensor([0.4, 0.4, -1.0, -0.5, 0.1, 0.5], dtype=torch.float64)
LIKED = torch.tensor([True, True, True, False, False, False])
LIST = torch.tensor([[0.2, 0.5, -0.1, -0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.2, 0.4, 0.9, -0.3]], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -1.1, -1.4, -1.9]], dtype=torch.float64)


def close(actual: Tensor, expected: Tensor | list[float] | float, tolerance: float = 1e-9) -> bool:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    return actual.shape == wanted.shape and torch.allclose(actual, wanted, rtol=0, atol=tolerance)


def of(policy: Tensor, rewards: Tensor, present: Tensor | None = None) -> Group:
    present = torch.ones_like(policy, dtype=torch.bool) if present is None else present
    return Group(policy, torch.zeros_like(policy), rewards, present, torch.ones_like(policy))


# ------------------------------------------------------------------------------------------------------- single outputs


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("kto b=.5 kl=.15", partial(unpaired.kto, GAINS, LIKED, 0.15, beta=0.5)),
        ("apo_zero_unpaired", partial(unpaired.apo_zero_unpaired, GAINS, LIKED, 7.0, beta=0.5)),
        ("bco", partial(unpaired.bco, GAINS, LIKED, float(GAINS.mean()), beta=0.5)),
    ],
    ids=["kto", "apo_zero_unpaired", "bco"],
)
def test_unpaired_losses_are_trl_s(name: str, loss: Callable[[], Tensor]) -> None:
    assert close(loss(), VALUES[name])


def test_kto_is_diffusion_kto_s_at_twice_its_beta() -> None:
    """The release multiplies differences of errors, and our scores are minus half an error."""
    gains = torch.tensor([0.001, 0.0004, -0.0008, -0.0002, 0.0006, 0.0001], dtype=torch.float64) / 2
    assert close(unpaired.kto(gains, LIKED, float(gains.mean()), beta=2000.0), VALUES["diffusion-kto g, b=1000"])


def test_kto_without_gain_of_the_batch_is_apo_zero_unpaired() -> None:
    assert close(unpaired.kto(GAINS, LIKED, KTOLossConfig().baseline(-0.3), beta=0.5), VALUES["apo_zero_unpaired"])


def test_both_sides_of_pairs_are_apo_zero() -> None:
    chosen, rejected = GAINS[[0, 1, 2]], GAINS[[3, 4, 5]]
    apart = unpaired.apo_zero_unpaired(GAINS, LIKED, 0.0, beta=0.5)
    assert close(apart[:3] + apart[3:], torch.sigmoid(-0.5 * chosen) + torch.sigmoid(0.5 * rejected))


def test_kto_baseline_is_a_moving_average_of_the_gains() -> None:
    assert KTOLossConfig(decay=0.9).next_average(0.2, 3, 0.7) == pytest.approx(0.25)


def test_bco_baseline_is_the_mean_of_all_updates() -> None:
    baseline = 0.0
    for updates, gain in enumerate([0.3, -0.1, 0.7]):
        baseline = BCOLossConfig().next_average(baseline, updates, gain)
    assert baseline == pytest.approx(0.3)


@pytest.mark.parametrize("name", Choice.sections(UnpairedLossConfig))
def test_gradients_raise_liked_outputs_and_lower_others(name: str) -> None:
    gains = GAINS.clone().requires_grad_()
    bound_loss(Choice.sections(UnpairedLossConfig)[name](name=name), 0.5)(gains, LIKED, 0.1).sum().backward()
    assert gains.grad is not None
    assert torch.equal(gains.grad < 0, LIKED)


# ---------------------------------------------------------------------------------------------------------------- lists

LAMBDA = partial(groups.lambda_rank, beta=0.5, scaled=False)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("plackett_luce", partial(groups.plackett_luce, of(LIST, REWARDS), beta=0.5)),
        ("lambda_rank ranks by score", partial(LAMBDA, of(LIST, REWARDS))),
        ("lambda_rank ranks by reward", partial(LAMBDA, of(LIST, REWARDS), ranks="reward")),
        ("info_nca alpha=.5", partial(groups.info_nca, of(LIST, REWARDS), beta=0.5, alpha=0.5)),
        ("nca multi alpha=.5", partial(groups.nca, of(LIST, REWARDS), beta=0.5, alpha=0.5)),
        ("rrhf", partial(groups.rrhf, of(LIST, REWARDS), beta=1.0, nll=0.0)),
        ("pro (ranking)", partial(groups.pro, of(MEANS, REWARDS[:, [0, 2, 1, 3]]), beta=1.0, nll=0.0)),  # best first
        (
            "d2o alpha=1 b=.5: anchors 0..2 vs 3",
            partial(groups.d2o, of(LIST, torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)), beta=0.5),
        ),
    ],
    ids=["plackett_luce", "lambda_rank", "lambda_rank by reward", "info_nca", "nca", "rrhf", "pro", "d2o"],
)
def test_group_losses_have_the_worked_values(name: str, loss: Callable[[], Tensor]) -> None:
    assert close(loss(), [VALUES[name]])


BETA = 0.7
PAIRS: dict[str, tuple[Callable[[Group], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "plackett_luce": (partial(groups.plackett_luce, beta=BETA), lambda h, m, gap: F.softplus(-BETA * (h - m))),
    "info_nca": (
        partial(groups.info_nca, beta=BETA),
        lambda h, m, gap: (
            torch.sigmoid(gap) * F.softplus(-BETA * (h - m)) + torch.sigmoid(-gap) * F.softplus(BETA * (h - m))
        ),
    ),
    "nca": (
        partial(groups.nca, beta=BETA, alpha=1e-6),
        lambda h, m, gap: F.softplus(-BETA * h) + (F.softplus(BETA * h) + F.softplus(BETA * m)) / 2,
    ),
    "copg": (partial(groups.copg, beta=BETA), lambda h, m, gap: (BETA * (h - m) - gap).square() / 2),
    "d2o": (partial(groups.d2o, beta=BETA), lambda h, m, gap: F.softplus(-BETA * (h - m))),
    "pro": (partial(groups.pro, beta=BETA, nll=0.0), lambda h, m, gap: F.softplus(-BETA * gap * (h - m))),
    "rrhf": (partial(groups.rrhf, beta=1.0, nll=0.0), lambda h, m, gap: F.relu(m - h)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_list_of_two_is_a_pair(name: str) -> None:
    """On random scores and gaps, in float64."""
    loss, pair = PAIRS[name]
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(32, 2, generator=g, dtype=torch.float64)
    gap = torch.rand(32, generator=g, dtype=torch.float64) + 0.1
    rewards = torch.stack([gap, torch.zeros_like(gap)], 1)
    assert close(loss(of(scores, rewards)), pair(scores[:, 0], scores[:, 1], gap), 1e-12)


@pytest.mark.parametrize(("ranks", "scaled"), [("policy", False), ("reward", False), ("policy", True)])
def test_lambda_rank_of_two_is_a_multiple_of_dpo(ranks: str, scaled: bool) -> None:
    """With rewards 1 and 0; scaled they are 3 and 0, of which 2^R differ by 7."""
    scores = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(8, 2)
    factor = VALUES["lambda K=2 factor ln, log2"][0] * (7 if scaled else 1)
    actual = groups.lambda_rank(of(scores, rewards), beta=BETA, ranks=ranks, scaled=scaled)  # type: ignore[arg-type]
    assert close(actual, factor * F.softplus(-BETA * (scores[:, 0] - scores[:, 1])), 1e-12)


def test_lambda_rank_learns_from_equal_gains() -> None:
    """Before the first update all gains are 0; ranks then follow the rewards, or every weight would be 0."""
    scores = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    groups.lambda_rank(of(scores, torch.tensor([[0.0, 2.0, 1.0]])), beta=1.0).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 1] < 0 < scores.grad[0, 0]


def test_plackett_luce_does_not_change_with_a_constant() -> None:
    both = [groups.plackett_luce(of(LIST + shift, REWARDS), beta=0.5) for shift in (0.0, 3.0)]
    assert close(both[0], both[1])


def test_info_nca_of_a_low_temperature_is_the_best_one_s() -> None:
    loss = groups.info_nca(of(LIST, REWARDS), beta=0.5, alpha=1e-4)
    assert close(loss, -torch.log_softmax(0.5 * LIST, 1)[:, 0])


LOSSES = Choice.sections(GroupLossConfig)
every_loss = pytest.mark.parametrize("name", LOSSES)


def bound(name: str) -> Callable[[Group], Tensor]:
    return bound_loss(LOSSES[name](name=name), 0.5)


@every_loss
def test_missing_outputs_change_nothing(name: str) -> None:
    """A list of four and the same list among longer ones, with numbers of no meaning where outputs are missing."""
    g = torch.Generator().manual_seed(3)
    scores = torch.cat([LIST, torch.randn(1, 3, generator=g, dtype=torch.float64)], 1).requires_grad_()
    rewards = torch.cat([REWARDS, torch.tensor([[9.0, -9.0, 0.4]], dtype=torch.float64)], 1)
    present = torch.tensor([[True] * 4 + [False] * 3])
    loss = bound(name)
    actual = loss(of(scores, rewards, present))
    assert close(actual.detach(), loss(of(LIST, REWARDS)))
    actual.sum().backward()
    assert scores.grad is not None and not scores.grad[0, 4:].any()


@every_loss
def test_order_of_the_outputs_does_not_matter(name: str) -> None:
    order, loss = [2, 0, 3, 1], bound(name)
    assert close(loss(of(LIST, REWARDS)), loss(of(LIST[:, order], REWARDS[:, order])))


@every_loss
def test_a_step_of_the_best_against_the_worst(name: str) -> None:
    scores = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    bound(name)(of(scores, REWARDS)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < scores.grad[0, 3]


@pytest.mark.parametrize("name", ["plackett_luce", "lambda_rank", "d2o"])
def test_equal_rewards_are_not_compared(name: str) -> None:
    assert close(bound(name)(of(LIST, torch.zeros_like(LIST))), [0.0])


def test_extreme_scores_stay_finite() -> None:
    for name in LOSSES:
        scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        loss = bound(name)(of(scores, torch.tensor([[1.0, 3.0, 2.0]])))
        loss.sum().backward()
        assert scores.grad is not None
        assert torch.isfinite(loss).all() and torch.isfinite(scores.grad).all(), name
