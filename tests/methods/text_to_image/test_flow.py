"""Diffusion-DPO and MaPO on velocities: published values, and the constant that MaPO has for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, mean_square
from mmalign.families.types import Conditioning
from mmalign.methods.text_to_image import _denoising, diffusion_dpo, mapo
from mmalign.methods.text_to_image._denoising import Contrast, NoisedPairs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG
from tests.helpers.golden import golden

GOLDEN = golden("flow_dpo")
GIVEN = {name: torch.tensor(x) for name, x in GOLDEN["inputs"].items()}
# A family whose network is its answer: published values are of given predictions.
FAMILY: Any = SimpleNamespace(predict=lambda net, x_t, t, cond: net, schedule=Flow(shift=3.0))


def view() -> NoisedPairs:
    x_0, eps, t = GIVEN["latents"], GIVEN["noise"], GIVEN["sigma"]
    return NoisedPairs(
        Flow().add_noise(x_0, eps, t), t, Flow().target(x_0, eps, t), Conditioning({"embeds": t[:, None]})
    )


def policy(answers: Tensor) -> Policy:
    net: Any = answers
    return Policy(FAMILY, net, net, None)


def test_published_noising() -> None:
    torch.testing.assert_close(view().x_t, GIVEN["noisy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(view().target, GIVEN["target"], rtol=1e-5, atol=1e-6)


def test_published_loss_and_gradient() -> None:
    """Flow-GRPO's offline DPO at its beta of 100; float32, tolerance of another order of summing."""
    expected = GOLDEN["cases"]["beta100"]["expected"]
    answers = GIVEN["model_pred"].clone().requires_grad_(True)
    reference: Any = GIVEN["ref_pred"]
    reference_scores = _denoising.denoising_scores(FAMILY, reference, view())
    contrast = Contrast(view(), reference_scores, torch.ones(3))
    step = diffusion_dpo.loss(policy(answers), contrast, diffusion_dpo.Config(beta=100.0))
    torch.testing.assert_close(step.metrics["chosen error"], torch.tensor(expected["model_w_err"]))
    torch.testing.assert_close(-2 * reference_scores["rejected"], torch.tensor(expected["ref_l_err"]))
    torch.testing.assert_close(step.metrics["logit"], torch.tensor(expected["inside_term"]), rtol=2e-5, atol=2e-5)
    loss = step.losses.mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=2e-5)
    assert answers.grad is not None
    torch.testing.assert_close(answers.grad, torch.tensor(expected["grad_model_pred"]), rtol=2e-5, atol=2e-5)


def test_published_errors_of_noise_and_image() -> None:
    given, flow = GOLDEN["velocity_epsilon_identity"], Flow()
    x_t, t, answers = view().x_t, GIVEN["sigma"], GIVEN["model_pred"]
    errors = {
        "mse_v": mean_square(answers, view().target),
        "mse_eps": mean_square(flow.to_eps(answers, x_t, t), GIVEN["noise"]),
        "mse_x0": mean_square(flow.to_clean(answers, x_t, t), GIVEN["latents"]),
    }
    for name, error in errors.items():
        torch.testing.assert_close(error, torch.tensor(given[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "weight"), [(1.0, 0.29338), (3.0, 0.11339)])
def test_velocity_weight_is_the_mean_over_times(shift: float, weight: float) -> None:
    """E[(1 - t)^2]; unshifted it is E[t^2] = 1/4 + the variance of a logit-normal(0, 1), 0.0434."""
    flow = Flow(shift=shift)
    assert flow.epsilon_weight == pytest.approx(weight, abs=1e-5)
    t = flow.draw_time(range(40_000), KeyedRNG(0))
    assert float((1 - t).square().mean()) == pytest.approx(weight, abs=0.004)  # four standard errors


def test_mapo_margin_has_the_releases_mean_slope() -> None:
    """The margin's slope in an error of epsilon is T * snr / 2 = 250. An answer that is off by d in the velocity is off
    by (1 - t) d in epsilon; with the own constant, a small d moves z as much as at the release's, on the mean of times.
    """
    flow, d = Flow(shift=3.0), 1e-3
    t = flow.draw_time(range(40_000), KeyedRNG(0)).double()
    in_epsilon = -250 * ((1 - t) ** 2 * d)
    in_velocity = -1000 * mapo.own_snr(flow) / 2 * d
    assert in_velocity == pytest.approx(float(in_epsilon.mean()), rel=0.03)
    assert mapo.own_snr(flow) == pytest.approx(0.0567, abs=1e-4)
    beta_schedule = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    assert mapo.own_snr(Diffusion.from_config(beta_schedule, "here")) == 0.5


def test_mapo_is_reference_free_dpo_near_equality() -> None:
    """beta * softplus(-z) with z = T * snr * (score's margin), and the chosen error beside it."""
    answers = view().target + 0.05 * torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    contrast = Contrast(view(), None, torch.ones(3))
    step = mapo.loss(policy(answers), contrast, mapo.Config())
    scores = _denoising.denoising_scores(FAMILY, answers, view())  # type: ignore[arg-type]
    z = 1000 * mapo.own_snr(FAMILY.schedule) * (scores["chosen"] - scores["rejected"])
    expected = -2 * scores["chosen"] + 0.1 * torch.nn.functional.softplus(-z)
    torch.testing.assert_close(step.losses, expected, rtol=1e-4, atol=1e-5)
    given = mapo.loss(policy(answers), contrast, mapo.Config(snr=0.5))
    assert not torch.allclose(given.losses, step.losses, atol=1e-4)
