"""Worked values of the losses of generated outputs, and the laws between them, in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.losses import forward_process, pairwise
from mmalign.losses.pairwise import Pair
from tests.helpers.golden import golden

VALUES = golden("objectives")
INPUTS = {k: torch.tensor(v, dtype=torch.float64) for k, v in VALUES["forward inputs"].items()}
T, CLIP = 0.4, 5.0
TARGET = INPUTS["eps"] - INPUTS["x_0"]
NEW, OLD, REFERENCE = (INPUTS[f"v_{name}"] for name in ("policy", "old", "reference"))
ADVANTAGE = torch.tensor([VALUES["A"]], dtype=torch.float64)
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 1e-12}


def error(prediction: Tensor, target: Tensor = TARGET) -> Tensor:
    """Mean squared error [1, K] of a flow's velocities [K, D]."""
    return (prediction - target).square().mean(1)[None]


def close(actual: Tensor, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **(EXACT | tolerance))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor = NEW) -> Tensor:
    """Gradient of the loss of one prompt by the policy's prediction."""
    prediction = at.clone().requires_grad_()
    loss(prediction).sum().backward()
    assert prediction.grad is not None
    return prediction.grad


def test_inputs_are_the_specification_s() -> None:
    close(error(NEW)[0], VALUES["fp mse new"])
    close(error(OLD)[0], VALUES["fp mse old"])
    close(error(NEW, OLD)[0], VALUES["fp d2"])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_weighted_nft_is_the_release_s(beta: float) -> None:
    """An error of x_0 is t times one of v in flow matching; the release multiplies by the bound of the advantages."""
    released = VALUES[f"nft beta={'1' if beta == 1 else '.1'}"]
    for i in range(4):
        new, old = (T * (v - TARGET)[i].view(1, 1, -1) for v in (NEW, OLD))
        loss = forward_process.weighted_nft(new, old, ADVANTAGE[:, i : i + 1] / CLIP, beta=beta)
        close(CLIP * loss[0], released[i])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_published_loss_without_weighting(beta: float) -> None:
    """Up to a constant: in value between two policies, and in gradient."""
    share = (ADVANTAGE / CLIP).clamp(-1, 1)

    def published(prediction: Tensor) -> Tensor:
        positive, negative = (1 - beta) * OLD + beta * prediction, (1 + beta) * OLD - beta * prediction
        r = (1 + share) / 2
        return CLIP / beta * T**2 * (r * error(positive) + (1 - r) * error(negative)).mean(1)

    def ours(prediction: Tensor) -> Tensor:
        losses = forward_process.nft(error(prediction), error(OLD), error(prediction, OLD), share, beta=beta)
        return CLIP * T**2 * losses

    close(published(NEW) - published(REFERENCE), ours(NEW) - ours(REFERENCE))
    close(gradient(published), gradient(ours))


def test_on_policy_nft_and_awm_have_the_advantage_s_gradient() -> None:
    """At the old policy both gradients are that of the mean of advantage times error."""
    expected = gradient(lambda v: (ADVANTAGE * error(v)).mean(1), OLD)
    close(gradient(lambda v: forward_process.awm(error(v), error(OLD), ADVANTAGE), OLD), expected)
    clipped = partial(forward_process.awm, old_error=error(OLD), advantage=ADVANTAGE, clip=0.1)
    close(gradient(lambda v: clipped(error(v)), OLD), expected)
    nft = partial(forward_process.nft, old_error=error(OLD), share=ADVANTAGE, beta=1.0)
    close(gradient(lambda v: nft(error(v), shift=error(v, OLD)), OLD), expected)


def test_awm_is_the_release_s() -> None:
    for i, expected in enumerate(VALUES["awm clip .1"]):
        row = slice(i, i + 1)
        close(forward_process.awm(error(NEW)[:, row], error(OLD)[:, row], ADVANTAGE[:, row], clip=0.1)[0], expected)


def test_awm_beyond_its_clip_has_no_gradient_on_the_favoured_side() -> None:
    """Errors that fell or rose by 1: the ratio is e or 1/e."""
    for advantage, change, free in ((1.0, -1.0, False), (1.0, 1.0, True), (-1.0, 1.0, False), (-1.0, -1.0, True)):
        own = torch.full((1, 2), 2.0 + change, requires_grad=True)
        forward_process.awm(own, torch.full((1, 2), 2.0), torch.full((1, 2), advantage), clip=0.1).sum().backward()
        assert own.grad is not None and bool(own.grad.any()) == free


def test_measures_of_an_error() -> None:
    """Error 0.0081 at noise 0.5: itself, 0.00405, and 2 (0.3 - 0.1 ** 2.5); the root is finite at 0."""
    own, noise = torch.tensor([[0.0081]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    actual = [float(forward_process.measured(own, noise, measure)) for measure in ("plain", "noise", "root")]
    assert actual == pytest.approx([0.0081, 0.00405, 2 * (0.3 - 0.1**2.5)], rel=1e-12)
    nothing = torch.zeros(1, 1, requires_grad=True)
    forward_process.measured(nothing, torch.ones(1, 1), "root").sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_dgpo_has_the_release_s_gradient() -> None:
    """The release: `mean(S A error)` with S the sigmoid of beta's sum, without gradient."""
    beta = 100.0
    close(
        forward_process.dgpo(error(NEW), error(REFERENCE), ADVANTAGE, beta=beta)[0],
        VALUES["dgpo ours softplus(S)/beta"],
    )
    total = (beta * (ADVANTAGE * (error(NEW) - error(REFERENCE))).mean(1)).sigmoid()
    close((total * (ADVANTAGE * error(NEW)).mean(1))[0], VALUES["dgpo release value"])
    expected = gradient(lambda v: (total * ADVANTAGE * error(v)).mean(1))
    close(gradient(lambda v: forward_process.dgpo(error(v), error(REFERENCE), ADVANTAGE, beta=beta)), expected)


def test_dgpo_of_two_is_diffusion_dpo_with_the_same_beta() -> None:
    beta, sides = 2000.0, torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    policy, reference = (Pair(*(-0.5 * error(v)[:, :2]).unbind(1)) for v in (NEW, REFERENCE))
    expected = pairwise.dpo(policy, reference, beta=beta) / beta
    close(forward_process.dgpo(error(NEW)[:, :2], error(REFERENCE)[:, :2], sides, beta=beta), expected)


def test_trust_region_of_dgpo_stops_what_moved_far_enough() -> None:
    """Errors that fell or rose by 0.5, with a positive and with a negative advantage."""
    own = torch.tensor([[1.5, 2.5, 1.5, 2.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    result = forward_process.within_trust(own, torch.full((1, 4), 2.0), advantage, clip=0.1)
    assert torch.equal(result, own)
    result.sum().backward()
    assert own.grad is not None and own.grad.tolist() == [[0, 1, 1, 0]]


def test_crd_is_the_release_s_and_of_two_copg() -> None:
    loss = forward_process.crd(error(NEW), error(OLD), ADVANTAGE / CLIP, beta=1.0)
    close(CLIP * loss[0], VALUES["crd uniform mse b=1 (mean)"])
    pair, share = slice(0, 2), torch.tensor([[0.6, -0.2]], dtype=torch.float64)
    gap = (error(OLD) - error(NEW))[0, 0] - (error(OLD) - error(NEW))[0, 1]
    of_two = forward_process.crd(error(NEW)[:, pair], error(OLD)[:, pair], share, beta=0.5)
    close(of_two[0], 0.5 * (0.5 * gap - 0.4) ** 2 / (0.5 * 2))


def test_equal_shares_teach_crd_to_stay() -> None:
    assert math.isclose(float(forward_process.crd(error(OLD), error(OLD), torch.zeros(1, 4), beta=1.0)), 0.0)
    assert not gradient(lambda v: forward_process.crd(error(v), error(OLD), torch.zeros(1, 4), beta=1.0), OLD).any()
