"""Inversion: it ends at t, agrees with diffusers and with the published values, and is Euler's step for a flow."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from mmalign.diffusion import inversion
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.inversion import Hop
from mmalign.diffusion.noise import Diffusion, Schedule
from tests.benchmarks.inversion_error import SCHEDULES, gaussian_errors
from tests.helpers.golden import golden

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
EPSILON = Diffusion.from_config({**SD15, "prediction_type": "epsilon"}, "test")
VELOCITY = Diffusion.from_config({**SD15, "prediction_type": "v_prediction"}, "test")
GOLDEN = golden("inpo")
TIMES = torch.tensor([0, 1, 2, 99, 100, 101, 550, 999])
SIGMAS = torch.tensor([1e-4, 0.05, 0.09, 0.101, 0.52, 0.77, 0.91, 0.9999])
PROCESSES = [(EPSILON, TIMES), (VELOCITY, TIMES), (Flow(), SIGMAS), (Flow(shift=3.0), SIGMAS)]
IDS = ["epsilon", "velocity", "flow", "shifted flow"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def never(_: int) -> Tensor:
    raise AssertionError("fresh noise was asked for")


def toy(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """A smooth network with a number of its own for every row."""
    return 0.8 * x + 0.3 * torch.sin(t.view(-1, 1, 1, 1) / 100) + shift.view(-1, 1, 1, 1) * torch.tanh(x)


def run(schedule: Schedule, x_0: Tensor, t: Tensor, steps: int = 10, way: Any = inversion.exact) -> Tensor:
    shift = torch.linspace(-0.2, 0.2, len(t)) if len(t) > 1 else torch.tensor([-0.2])
    return inversion.invert(
        lambda x, time, rows: toy(x, time, shift[rows]), schedule, x_0, way(schedule, t, steps=steps), never
    )


def knowing(schedule: Schedule, x_0: Tensor, eps: Tensor, way: Callable[..., Iterator[Hop]], t: Tensor) -> Any:
    """The perfect network for one image: it finds whatever noise there is in x, by the levels that x really has."""
    hops = list(way(schedule, t))
    levels: dict[int, tuple[Tensor, Tensor]] = {}
    number = iter(range(len(hops)))

    def predict(x: Tensor, _: Tensor, rows: Tensor) -> Tensor:
        hop, asked = hops[i := next(number)], hops[i].at
        result = eps[rows] if i == 0 else (x - levels[i - 1][0][rows] * x_0[rows]) / levels[i - 1][1][rows]
        signal, noise = (torch.ones(len(x_0), 1, 1, 1) for _ in range(2))
        spread = hop.spread if hop.spread is not None else torch.zeros(())
        signal[rows], noise[rows] = hop.signal, (hop.direction**2 + spread**2).sqrt()
        levels[i] = signal, noise
        # As the schedule turns it back into (found, x_0) at the time that it was asked at.
        if isinstance(schedule, Diffusion) and schedule.prediction == "epsilon":
            return result
        if isinstance(schedule, Flow):
            return result - x_0[rows]
        a, n = schedule.levels(asked)
        return (result - n * x) / a

    return predict, iter(hops)


@pytest.mark.parametrize(("schedule", "t"), PROCESSES, ids=IDS)
def test_every_row_ends_at_the_levels_of_its_own_t(schedule: Schedule, t: Tensor) -> None:
    """A network that finds the noise which is there leads to signal(t) x_0 + noise(t) eps: both factors are t's."""
    x_0, eps = normal(1, 8, 4, 8, 8), normal(2, 8, 4, 8, 8)

    def way(schedule: Schedule, t: Tensor) -> Iterator[Hop]:
        return inversion.exact(schedule, t, steps=10)

    predict, hops = knowing(schedule, x_0, eps, way, t)
    x_t = inversion.invert(predict, schedule, x_0, hops, never)
    # float32, divided by the noise of the first places and by the signal of the last ones
    torch.testing.assert_close(x_t, schedule.add_noise(x_0, eps, t), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize(("schedule", "t"), PROCESSES, ids=IDS)
@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_fresh_noise_takes_the_place_of_the_network_s(schedule: Schedule, t: Tensor, eta: float) -> None:
    """The implied noise has variance 1 at every t: 16,384 numbers a row tell it to 1.1 %, four times that allowed."""
    x_0, eps = normal(1, 8, 4, 64, 64), normal(2, 8, 4, 64, 64)

    def way(schedule: Schedule, t: Tensor) -> Iterator[Hop]:
        return inversion.exact(schedule, t, steps=10, eta=eta)

    predict, hops = knowing(schedule, x_0, eps, way, t)
    x_t = inversion.invert(predict, schedule, x_0, hops, lambda number: normal(10 + number, *x_0.shape))
    implied = inversion.implied_noise(schedule, x_t, x_0, t)
    variance = implied.flatten(1).square().mean(1)
    assert (variance - 1).abs().max() < 4 * (2 / 16384) ** 0.5
    moved = (implied - eps).flatten(1).square().mean(1)
    several = t > (100 if isinstance(schedule, Diffusion) else 0.1)
    assert (moved[several] > 1e-4).all() and (moved[~several] < 1e-4).all()  # one hop has no place for fresh noise


def test_inversion_levels_of_release_and_exact() -> None:
    """Its number of network calls, and the level that it really reaches, for seventeen timesteps in one batch."""
    rows = GOLDEN["noise_level_table"]["rows"]
    t = torch.tensor([row["train_t"] for row in rows])
    calls, reached = torch.zeros(len(t)), torch.zeros(len(t))
    for hop in inversion.release(EPSILON, t, steps=10):
        calls[hop.rows] += 1
        reached[hop.rows] = hop.direction.flatten()
    expected = EPSILON.levels(torch.tensor([row["final_level"] for row in rows]))[1].flatten()
    assert calls.tolist() == [row["network_calls"] for row in rows]
    assert torch.equal(reached, expected)
    for hop in inversion.exact(EPSILON, t, steps=10):
        reached[hop.rows] = hop.direction.flatten()
    assert torch.equal(reached, EPSILON.levels(t)[1].flatten())


def test_inversion_path_has_equal_short_steps() -> None:
    asked: dict[int, list[int]] = {int(t): [] for t in TIMES}
    for hop in inversion.exact(EPSILON, TIMES, steps=10):
        for row, time in zip(hop.rows.tolist(), hop.asked.tolist(), strict=True):
            asked[int(TIMES[row])].append(time)
    assert asked[0] == asked[1] == asked[2] == asked[99] == asked[100] == [1]
    assert asked[101] == [1, 50]
    assert asked[550] == [1, 92, 183, 275, 367, 458]
    assert asked[999] == [1, 100, 200, 300, 400, 500, 599, 699, 799, 899]
    asked_of_a_flow = [float(hop.asked[0]) for hop in inversion.exact(Flow(), torch.tensor([0.25]), steps=10)]
    assert asked_of_a_flow == pytest.approx([0.0, 0.25 / 3, 0.5 / 3])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("schedule", "t"), PROCESSES, ids=IDS)
def test_a_row_s_inversion_is_its_own_whatever_its_company(schedule: Schedule, t: Tensor, order: int) -> None:
    x_0, shift = normal(1, 8, 4, 8, 8), torch.linspace(-0.2, 0.2, 8)

    def of(at: list[int]) -> Tensor:
        own = torch.tensor(at)
        hops = inversion.exact(schedule, t[own], steps=10, eta=0.5, order=order)
        return inversion.invert(
            lambda x, time, rows: toy(x, time, shift[own][rows]),
            schedule,
            x_0[own],
            hops,
            lambda number: normal(number, 8, 4, 8, 8)[own],
        )

    whole = of(list(range(8)))
    for at in ([3], [7, 0, 5], list(reversed(range(8)))):
        assert torch.equal(of(at), whole[at])


@pytest.mark.parametrize("steps", [10, 20])
def test_diffusers_agrees_where_the_grids_coincide(steps: int) -> None:
    """At t = 900 our grid is its "leading" one without an offset: 0, 100, ..., 900. Its answers are given at the place
    where x is; and its image is clean before timestep 0, so the first of its hops is longer by as much as it takes."""
    scheduler = DDIMInverseScheduler(**SD15, set_alpha_to_one=True, clip_sample=False, steps_offset=0)
    stride = 1000 // steps
    x_0, shift = normal(1, 2, 4, 8, 8), torch.tensor([-0.2, 0.2])
    x = x_0
    for there in range(stride, 901, stride):
        scheduler.set_timesteps(steps - 1 if there == stride else steps)
        asked = torch.full((2,), max(there - stride, 1))
        x = scheduler.step(toy(x, asked, shift), there, x).prev_sample
    actual = run(EPSILON, x_0, torch.tensor([900, 900]), steps)
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)
    assert (x - x_0).abs().mean() > 0.1


def test_diffusers_agrees_on_velocity() -> None:
    """It begins at the level of timestep 0, as the release does; so its grid is the release's with an offset of 1."""
    scheduler = DDIMInverseScheduler(
        **SD15, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(10)
    x_0, shift = normal(1, 2, 4, 8, 8), torch.tensor([-0.2, 0.2])
    x = x_0
    for there in scheduler.timesteps.tolist()[:7]:
        x = scheduler.step(toy(x, torch.full((2,), there - 100), shift), there, x).prev_sample
    actual = run(VELOCITY, x_0, torch.tensor([550, 601]), way=inversion.release)
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_the_release_s_inversion(name: str) -> None:
    """Every step's latents and its factor of fresh noise, and the implied noise: published values, in float64."""
    case, given = GOLDEN["cases"][name]["expected"], GOLDEN["cases"][name]["inputs"]
    x_0, t = torch.tensor(given["latents"], dtype=torch.float64), torch.tensor(given["timesteps"])
    p0, p1, p2 = given["policy_params"]
    prompt = torch.tensor(given["prompt_scalar"], dtype=torch.float64).view(-1, 1, 1, 1)
    seen, times = [], []

    def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        seen.append(x)
        times.append(time.tolist())
        return p0 * x + p1 * torch.sin(time.view(-1, 1, 1, 1).double() / 100) + p2 * prompt[rows]

    x_t = inversion.invert(predict, EPSILON, x_0, inversion.release(EPSILON, t, steps=10), never)
    assert times == [[time, time] for time in case["times"]]
    # The levels are float32, as the scheduler's are.
    for mine, step in zip([*seen[1:], x_t], case["steps"], strict=True):
        torch.testing.assert_close(mine, torch.tensor(step["latents"], dtype=torch.float64), rtol=5e-7, atol=5e-7)
    implied = inversion.implied_noise(EPSILON, x_t, x_0, t)
    torch.testing.assert_close(implied, torch.tensor(case["target_noise"]).double(), rtol=1e-6, atol=1e-6)
    for hop, step in zip(inversion.release(EPSILON, t, steps=10, eta=1.0), case["steps"], strict=True):
        assert hop.spread is not None
        # 1 - abar in float32, at abar of 0.999
        torch.testing.assert_close(hop.spread.flatten(), torch.full((2,), step["sqrt_variance"]), rtol=2e-4, atol=0.0)


def test_the_release_s_grid_needs_whole_timesteps() -> None:
    with pytest.raises(ValueError, match=r"method\.inversion: release needs a grid of whole timesteps"):
        run(Flow(), normal(1, 2, 4, 8, 8), torch.tensor([0.3, 0.4]), way=inversion.release)


def test_a_flow_s_inversion_is_euler_s_method() -> None:
    """x + (s' - s) v by hand, row by row, from 0 to each row's own sigma."""
    x_0, shift, flow = normal(1, 8, 4, 8, 8), torch.linspace(-0.2, 0.2, 8), Flow()
    actual = run(flow, x_0, SIGMAS)
    for row, sigma in enumerate(SIGMAS.tolist()):
        x, number = x_0[row : row + 1], max(1, int(-(-sigma * 10 // 1)))
        for i in range(number):
            here, there = sigma * i / number, sigma * (i + 1) / number
            x = x + (there - here) * toy(x, torch.tensor([here]), shift[row : row + 1])
        torch.testing.assert_close(actual[row], x[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flow", [Flow(), Flow(shift=3.0)], ids=["flow", "shifted flow"])
def test_order_2_is_heun_s_method_for_a_flow(flow: Flow) -> None:
    """x + (s' - s) times the mean of v at both ends, by hand."""
    x_0, shift = normal(1, 8, 4, 8, 8), torch.linspace(-0.2, 0.2, 8)
    hops = inversion.exact(flow, SIGMAS, steps=10, order=2)
    actual = inversion.invert(lambda x, time, rows: toy(x, time, shift[rows]), flow, x_0, hops, never)
    for row, sigma in enumerate(SIGMAS.tolist()):
        x, number = x_0[row : row + 1], max(1, int(-(-sigma * 10 // 1)))
        for i in range(number):
            here, there = sigma * i / number, sigma * (i + 1) / number
            first = toy(x, torch.tensor([here]), shift[row : row + 1])
            second = toy(x + (there - here) * first, torch.tensor([there]), shift[row : row + 1])
            x = x + (there - here) * (first + second) / 2
        torch.testing.assert_close(actual[row], x[0], rtol=1e-5, atol=1e-5)


def fine(prediction: str) -> Diffusion:
    """Return SD 1.5's process in 100,000 timesteps, so that rounded times and the noise of the first hardly matter."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 100_000, dtype=torch.float64).square() / 100
    return Diffusion((1 - betas).cumprod(0), prediction)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (fine("epsilon"), torch.tensor([50_000, 90_000])),
        (fine("v_prediction"), torch.tensor([50_000, 90_000])),
        (Flow(), torch.tensor([0.5, 0.9])),
    ],
    ids=["epsilon", "velocity", "flow"],
)
def test_inversion_error_falls_as_its_order_says(schedule: Schedule, t: Tensor) -> None:
    """With exact scores twice the steps halve the error of order 1, and quarter that of order 2."""
    for order, steps, least, most in ((1, 40, 1.65, 2.1), (2, 20, 3.7, 7.0)):
        coarse, half = (
            gaussian_errors(schedule, t, order=order, steps=n)[0].square().mean(1) for n in (steps, 2 * steps)
        )
        ratios = (coarse / half).sqrt()
        assert (ratios > least).all() and (ratios < most).all(), f"order {order}: {ratios.tolist()}"


@pytest.mark.parametrize("name", SCHEDULES)
def test_order_2_errs_a_third_as_much_for_as_many_calls(name: str) -> None:
    t = torch.tensor([0.25, 0.5, 0.75, 0.999] if name == "flow" else [250, 500, 750, 999])
    first, calls = gaussian_errors(SCHEDULES[name], t, order=1, steps=10)
    second, calls_2 = gaussian_errors(SCHEDULES[name], t, order=2, steps=5)
    assert (calls_2 <= calls + 1).all()
    assert (second.square().mean(1) < first.square().mean(1) / 4).all()
    assert (second[2:].square().mean(1) < first[2:].square().mean(1) / 6).all()


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_order_2_keeps_the_variance_with_fresh_noise(name: str, eta: float) -> None:
    """Latents of variance 1 and their exact network: x_t has the variance of its time, to 1.1 % of the 16,384 numbers
    and 2 % of the inversion."""
    schedule = SCHEDULES[name]
    t = torch.tensor([0.3, 0.6, 0.999] if name == "flow" else [300, 600, 999])
    x_0 = normal(1, 3, 4, 64, 64).double()

    def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        signal, noise = schedule.levels(time)
        variance = signal**2 + noise**2
        return schedule.target(signal * x / variance, noise * x / variance, time)

    hops = inversion.exact(schedule, t, steps=20, eta=eta, order=2)
    x_t = inversion.invert(predict, schedule, x_0, hops, lambda number: normal(10 + number, *x_0.shape).double())
    signal, noise = schedule.levels(t)
    expected = (signal**2 + noise**2).flatten()
    assert (x_t.flatten(1).square().mean(1) / expected - 1).abs().max() < 4 * (2 / 16384) ** 0.5 + 0.02


def test_order_2_hops_are_even_in_noise_and_never_empty() -> None:
    asked = [int(hop.asked[0]) for hop in inversion.exact(EPSILON, torch.tensor([600]), steps=10, order=2)]
    assert asked == [1, 17, 67, 150, 267, 417]  # 600 (i / 6)^2
    for t in (0, 1, 2, 50, 999):
        ends = [
            int(hop.end[0])
            for hop in inversion.exact(EPSILON, torch.tensor([t]), steps=1000, order=2)
            if hop.end is not None
        ]
        assert ends[-1] == max(t, 1) and ends == sorted(set(ends))
    assert all(hop.end is None for hop in inversion.exact(EPSILON, TIMES, steps=10))
