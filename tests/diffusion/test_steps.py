"""Stochastic steps: published values, diffusers' own sampler, and the law that an SDE keeps its process's marginals."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, Gaussian, Schedule
from mmalign.rng import KeyedRNG
from tests.helpers.golden import golden

GOLDEN = golden("spo")
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def diffusion(prediction: str = "epsilon") -> Diffusion:
    return Diffusion.from_config({**CONFIG, "prediction_type": prediction}, "test")


def test_the_grid_and_its_noise_are_the_release_s() -> None:
    """RockeyCoss/SPO: 20 steps of DDIM with eta 1, from t = 951 to 1, the last of them to 0."""
    published = GOLDEN["schedule_20_steps"]
    times = diffusion().times(20)
    assert times[:-1].tolist() == published["timesteps"] and times[1:].tolist() == published["prev"]
    x = torch.zeros(20, 1, 1, 1)
    std = diffusion().step(x, x, times[:-1], times[1:], 1.0).std.flatten()
    # The last one is 0.02: 1 - abar_t / abar_prev in float32, as the release has it, is right to 1e-4 there.
    torch.testing.assert_close(std, torch.tensor(published["sigma_eta1"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["base", "clipped"])
def test_log_probabilities_are_the_release_s(name: str) -> None:
    """In float32, with a std of 0.02 at the last step: 2e-4 in nats."""
    case = GOLDEN["cases"][name]
    given = {k: torch.tensor(v) for k, v in case["inputs"].items() if isinstance(v, list)}
    prev = torch.tensor(case["schedule"]["prev_timesteps"])
    for who in ("policy", "ref"):
        law = diffusion().step(given[f"noise_pred_{who}"], given["latents"], given["timesteps"], prev, 1.0)
        for side, letter in (("win", "w"), ("lose", "l")):
            expected = torch.tensor(case["expected"][f"logp_{who}_{letter}"])
            result = law.log_prob(given[f"next_latents_{side}"])
            torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-4)


def test_the_image_that_the_judge_is_shown_is_the_release_s() -> None:
    case = GOLDEN["x0_helper"]
    x_t, prediction, t = (torch.tensor(case[k]) for k in ("latents", "noise_pred", "timesteps"))
    clean = diffusion().to_clean(prediction, x_t, t)
    torch.testing.assert_close(clean, torch.tensor(case["pred_original_sample"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_diffusers_ddim_walks_the_same_way_with_the_same_noise(prediction: str, eta: float) -> None:
    """20 steps with an arbitrary network. The last goes to abar_0 there too: set_alpha_to_one is false."""
    scheduler = DDIMScheduler(**CONFIG, prediction_type=prediction)
    scheduler.set_timesteps(20)
    schedule, rng = diffusion(prediction), KeyedRNG(0)
    times = schedule.times(20)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    actual = expected = rng.normal([1, 2], (4, 3, 3), "start")
    for i in range(20):
        noise = rng.normal([1, 2], (4, 3, 3), "step", i)
        t, prev = times[i].expand(2), times[i + 1].expand(2)
        actual = schedule.step(torch.tanh(actual), actual, t, prev, eta).sample(noise)
        expected = scheduler.step(
            torch.tanh(expected), int(times[i]), expected, eta=eta, variance_noise=noise
        ).prev_sample
    # Twenty divisions by small sqrt(abar) in another order; the latents are of size 10.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_log_probability_equals_torchs_mean() -> None:
    mean, std = torch.randn(3, 2, 4, 4), torch.tensor([0.02, 0.5, 2.0]).view(-1, 1, 1, 1)
    law, noise = Gaussian(mean, std), torch.randn(3, 2, 4, 4)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(law.sample(noise)).mean((1, 2, 3))
    torch.testing.assert_close(law.log_prob(law.sample(noise)), expected, rtol=1e-4, atol=1e-4)
    largest = -torch.log(std.flatten() * math.sqrt(2 * math.pi))
    torch.testing.assert_close(law.log_prob(mean), largest)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_s_grid_goes_from_noise_to_image(shift: float) -> None:
    times = Flow(shift=shift).times(10)
    assert len(times) == 11 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert times[5] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


def test_a_flow_s_step_worked_out() -> None:
    """sigma 0.8 to 0.5, level 0.5: g^2 = 0.25 * 4 = 1, dt = -0.3, so the mean is x (1 - 0.1875) + v (1.125) (-0.3)."""
    x, v = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    law = Flow().step(v, x, torch.tensor([0.8]), torch.tensor([0.5]), 0.5)
    torch.testing.assert_close(law.mean.item(), 2 * 0.8125 + 0.3375)
    torch.testing.assert_close(law.std.item(), math.sqrt(0.3))
    first = Flow().step(v, x, torch.tensor([1.0]), torch.tensor([0.5]), 0.5)  # 1 - 0.5 stands in: g^2 = 0.5
    torch.testing.assert_close(first.std.item(), 0.5)
    assert first.mean.isfinite().all()


@pytest.mark.parametrize("schedule", [diffusion(), Flow()], ids=["ddim", "flow"])
def test_a_step_keeps_the_process_s_marginals(schedule: Schedule) -> None:
    """With all images m, the exact answer, and x_t as the process noises m, the next x is as the process noises m.

    Mean and variance in closed form: a step is affine in x. DDIM's is exact for any stride; the flow's is an Euler
    step, so that what it lacks falls with the square of the stride.
    """
    m, eta = 0.7, 0.7

    def misses(t: torch.Tensor, prev: torch.Tensor) -> tuple[float, float]:
        def mean_at(x: torch.Tensor) -> Gaussian:
            signal, noise = schedule.levels(t)
            eps = (x - signal * m) / noise
            return schedule.step(schedule.target(torch.full_like(x, m), eps, t), x, t, prev, eta)

        zeros, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        at_zero = mean_at(zeros)
        slope = mean_at(ones).mean - at_zero.mean
        signal, noise = schedule.levels(t)
        signal_prev, noise_prev = schedule.levels(prev)
        mean = slope * signal * m + at_zero.mean
        variance = (slope * noise) ** 2 + at_zero.std**2
        return (mean - signal_prev * m).abs().item(), (variance - noise_prev**2).abs().item()

    if isinstance(schedule, Diffusion):
        assert max(misses(torch.tensor([751]), torch.tensor([601]))) < 1e-5
        return
    coarse, fine = (misses(torch.tensor([0.6]), torch.tensor([0.6 - d])) for d in (0.04, 0.02))
    assert max(coarse) < 4e-3
    for large, small in zip(coarse, fine, strict=True):
        assert small < 0.3 * large + 1e-7


def test_times_for_a_judge_are_in_steps_of_a_thousand() -> None:
    assert Flow().timestep(torch.tensor([0.25])).item() == 250
    assert diffusion().timestep(torch.tensor([751])).item() == 751


@pytest.mark.parametrize("schedule", [diffusion(), Flow(), Flow(shift=3.0)], ids=["ddpm", "flow", "shifted"])
def test_any_time_is_as_likely_as_any_other(schedule: Schedule) -> None:
    """4000 draws: the largest distance from the uniform law is above 0.031 in one of a thousand cases (Kolmogorov)."""
    drawn = schedule.timestep(schedule.any_time(range(4000), KeyedRNG(seed=1))).double().sort().values / 1000
    steps = torch.arange(1, 4001) / 4000
    assert (drawn - steps).abs().max() < 0.031
    assert drawn.min() >= 0 and drawn.max() < 1
    alone = schedule.any_time([17], KeyedRNG(seed=1))
    assert torch.equal(alone[0], schedule.any_time(range(20), KeyedRNG(seed=1))[17])


def test_what_has_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="600 are too many for a schedule of 1000 timesteps; expected at most 500"):
        diffusion().times(600)


def test_a_flow_s_grid_begins_at_pure_noise_whatever_the_shift() -> None:
    """In float32 some shifts rounded the first time past 1, where the step's variance is negative or without bound."""
    for mu in torch.arange(0.3, 3.0, 0.01).tolist():
        times = Flow(shift=math.exp(mu)).times(10)
        assert times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())


def test_what_is_not_given_is_the_published_noise() -> None:
    x, answer = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for schedule, t, prev, eta in (
        (Flow(), torch.tensor([0.6]), torch.tensor([0.5]), 0.7),
        (Diffusion.from_config(CONFIG, "test"), torch.tensor([501]), torch.tensor([451]), 1.0),
    ):
        given, silent = (schedule.step(answer, x, t, prev, e) for e in (eta, None))
        assert torch.equal(given.std, silent.std) and torch.equal(given.mean, silent.mean)
