"""Whole trajectories against diffusers' own samplers, with the same network and the same noise."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, Schedule
from mmalign.diffusion.walk import Walk
from mmalign.rng import KeyedRNG

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
ROWS = [3, 2**62]
START = KeyedRNG(0).normal(ROWS, (2, 4, 3, 3), "start").transpose(0, 1)  # two latents of each of two prompts


def answer(x: Tensor, t: Tensor) -> Tensor:
    """Network that reads the time."""
    return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def noise(k: int, index: int) -> Tensor:
    return KeyedRNG(0).normal(ROWS, (k, 4, 3, 3), "step", index).transpose(0, 1)


def walk(schedule: Schedule, steps: int = 8, eta: float | None = 0.0, stochastic: Tensor | None = None) -> Walk:
    return Walk(schedule, schedule.times(steps), answer, noise, eta, stochastic)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_walk_equals_ddim(prediction: str, eta: float) -> None:
    """Eight divisions by small sqrt(abar) in another order; the latents are of size 10."""
    config = {**CONFIG, "prediction_type": prediction}
    scheduler = DDIMScheduler(**config, timestep_spacing="leading")
    scheduler.set_timesteps(8)
    expected = START
    for index, t in enumerate(scheduler.timesteps):
        predicted = answer(expected.flatten(0, 1), t.expand(4)).view_as(expected)
        expected = scheduler.step(predicted, int(t), expected, eta=eta, variance_noise=noise(2, index)).prev_sample
    actual = list(walk(Diffusion.from_config(config, "test"), eta=eta).path(START))
    assert len(actual) == 9
    torch.testing.assert_close(actual[-1], expected, rtol=1e-4, atol=1e-4)


def test_walk_equals_eulers_method_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = Flow(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist())
    expected = START
    for t in scheduler.timesteps:
        predicted = answer(expected.flatten(0, 1), (t / 1000).expand(4)).view_as(expected)
        expected = scheduler.step(predicted, t, expected).prev_sample
    *_, actual = walk(flow).path(START)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "schedule", [Diffusion.from_config({**CONFIG, "prediction_type": "epsilon"}, "test"), Flow()], ids=["ddim", "flow"]
)
def test_steps_outside_the_window_are_deterministic(schedule: Schedule) -> None:
    """Steps 1 and 2 of the first prompt and step 4 of the second: exactly the steps of the two whole samplers."""
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[1:3, 0] = mask[4, 1] = True
    windowed = walk(schedule, 6, None, mask)
    for index, (x, following) in enumerate(pairwise(windowed.path(START))):
        predicted = windowed.prediction(x, index)
        noisy, still = (walk(schedule, 6, eta).step(x, index, predicted) for eta in (None, 0.0))
        assert torch.equal(following, torch.where(mask[index].view(1, 2, 1, 1, 1), noisy, still))
        assert (noisy != still).any((2, 3, 4)).all()
        assert torch.equal(windowed.law(x, index, predicted).std.flatten(1) > 0, mask[index].expand(2, 2))


def test_candidates_of_one_place_differ_in_noise_alone() -> None:
    schedule, x = Flow(), START[:1]
    noisy = walk(schedule, eta=0.7)
    predicted = noisy.prediction(x, 3)
    law = schedule.step(predicted[0], x[0], *(noisy.times[i].expand(2) for i in (3, 4)), 0.7)
    candidates = noisy.step(x, 3, predicted, candidates=5)
    torch.testing.assert_close((candidates - law.mean) / law.std, noise(5, 3), rtol=1e-4, atol=1e-4)
