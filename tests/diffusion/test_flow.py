"""Flow matching against diffusers' scheduler and its own algebra."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import mean_square
from mmalign.rng import KeyedRNG

T = torch.tensor([0.001, 0.3, 0.7, 0.999])
X_0, EPS, ANSWER = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()


def test_diffusers_agrees() -> None:
    """Its noise at the scheduler's own times, and a whole Euler step from t to t' along our velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    t = scheduler.timesteps[[10, 300, 600, 990]]
    torch.testing.assert_close(Flow().add_noise(X_0, EPS, t / 1000), scheduler.scale_noise(X_0, t, EPS))
    flow, (first, then) = Flow(), torch.tensor([[0.8], [0.55]]).expand(2, 4)
    x = flow.add_noise(X_0, EPS, first)
    velocity = flow.target(X_0, EPS, first)
    torch.testing.assert_close(x + (0.55 - 0.8) * velocity, flow.add_noise(X_0, EPS, then))


def test_the_right_answer_tells_image_and_noise_apart() -> None:
    flow = Flow()
    x_t, answer = flow.add_noise(X_0, EPS, T), flow.target(X_0, EPS, T)
    torch.testing.assert_close(flow.to_eps(answer, x_t, T), EPS)
    torch.testing.assert_close(flow.to_clean(answer, x_t, T), X_0)


def test_errors_are_related_by_their_exact_weights() -> None:
    """|eps error|^2 = (1 - t)^2 |v error|^2 and |x_0 error|^2 = t^2 |v error|^2, whatever the network says."""
    flow = Flow()
    x_t, error = flow.add_noise(X_0, EPS, T), mean_square(ANSWER, flow.target(X_0, EPS, T))
    torch.testing.assert_close(
        mean_square(flow.to_eps(ANSWER, x_t, T), EPS), (1 - T) ** 2 * error, rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(mean_square(flow.to_clean(ANSWER, x_t, T), X_0), T**2 * error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_logit_normal_and_shifted(shift: float) -> None:
    """Half of all times are below the shifted middle, and 68.3 % within one standard deviation of it in logits."""
    t = Flow(shift=shift).draw_time(range(20_000), KeyedRNG(0))
    middle = shift / (1 + shift)
    assert abs(float((t < middle).float().mean()) - 0.5) < 0.015
    logits = torch.logit(t / (shift - (shift - 1) * t))
    assert abs(float((logits.abs() < 1).float().mean()) - 0.683) < 0.015
    assert float(t.min()) > 0 and float(t.max()) < 1
