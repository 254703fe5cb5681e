"""Policy gradients on tokens: worked values, the laws of a policy that generated its answers, and TRL's formula."""

import math

import pytest
import torch
from torch import Tensor

from mmalign.losses.policy_gradient import clipped, is_clipped, k3, ratios

MASK = torch.tensor([[True, True, True], [True, True, False]])
LOGPS = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.2, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.4, -2.0, -0.4], [-0.2, -1.7, 0.0]], dtype=torch.float64)
A = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)


def test_ratios_of_tokens_and_of_sequences() -> None:
    """Log-ratios 0.4, 0, -0.1 and -0.1, 0.5: their means are 0.1 and 0.2."""
    each = ratios(LOGPS, OLD, MASK)
    assert each[0].log().tolist() == pytest.approx([0.4, 0.0, -0.1]) and each[1, :2].log().tolist() == pytest.approx(
        [-0.1, 0.5]
    )
    whole = ratios(LOGPS, OLD, MASK, "sequence")
    assert whole.log()[:, 0].tolist() == pytest.approx([0.1, 0.2]) and torch.equal(whole[:, :1].expand(2, 3), whole)


def test_a_token_is_clipped_on_the_side_that_its_advantage_favours() -> None:
    """A = 2: 1.49 counts as 1.2 and 0.9 as it is. A = -1: 0.9 counts as it is within 0.8, and 1.65 as it is."""
    ratio = ratios(LOGPS, OLD, MASK)
    losses = clipped(ratio, A, 0.2, 0.2)
    assert losses[0].tolist() == pytest.approx([-2.4, -2.0, -2 * math.exp(-0.1)])
    assert losses[1, :2].tolist() == pytest.approx([math.exp(-0.1), math.exp(0.5)])
    assert is_clipped(ratio, A, 0.2, 0.2)[MASK].tolist() == [True, False, False, False, False]
    assert clipped(ratio, A, 0.2, 0.6)[0, 0] == pytest.approx(-2 * math.exp(0.4))  # within the higher range
    assert clipped(ratio, A, 0.05, 0.2)[1, 0] == pytest.approx(0.95)  # past the lower one


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_the_advantage_times_log_p(importance: str) -> None:
    logps = LOGPS.clone().requires_grad_()
    losses = clipped(ratios(logps, LOGPS, MASK, importance), A, 0.2, 0.2)  # type: ignore[arg-type]
    mean = ((losses * MASK).sum(1) / MASK.sum(1)).sum()
    (gradient,) = torch.autograd.grad(mean, logps)
    expected = torch.where(MASK, -A / MASK.sum(1, keepdim=True), 0)
    torch.testing.assert_close(gradient, expected)


def test_k3_is_never_negative_and_its_mean_is_the_divergence() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    values = k3(p.log(), q.log())
    assert (values >= 0).all() and k3(p.log(), p.log()).abs().max() < 1e-15
    assert float((p * values).sum()) == pytest.approx(float((p * (p / q).log()).sum()))


def trl_loss(logps: Tensor, old: Tensor, reference: Tensor, beta: float, level: str, low: float, high: float) -> Tensor:
    """The per-token loss as the lines of TRL's GRPOTrainer compute it (1.9.2, `_compute_loss`)."""
    mask, advantages = MASK.double(), A
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_kl = torch.exp(reference - logps) - (reference - logps) - 1
    return per_token_loss + beta * per_token_kl


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_are_trl_s(level: str) -> None:
    reference = OLD + torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, 0.0]])
    own = clipped(ratios(LOGPS, OLD, MASK, level), A, 0.1, 0.28) + 0.04 * k3(LOGPS, reference)  # type: ignore[arg-type]
    expected = trl_loss(LOGPS, OLD, reference, 0.04, level, 0.1, 0.28)
    torch.testing.assert_close(own[MASK], expected.expand(2, 3)[MASK], rtol=0, atol=1e-12)
