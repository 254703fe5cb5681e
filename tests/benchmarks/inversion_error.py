"""Measure the error of InPO's inversion with exact scores: `python -m tests.benchmarks.inversion_error`.

Latents are Gaussian, one component of each standard deviation in STDS. Their exact network and their exact map from
image to noise are known: the map multiplies a component by std(x_t) / std(x_0). The error is that of the numerical map,
relative to it, as a root mean square over components. Timesteps are those of Stable Diffusion 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mmalign.diffusion import inversion
from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, Schedule

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
STDS = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float64)
WAYS = [(1, 10), (1, 20), (1, 50), (2, 5), (2, 10), (2, 20)]  # order, steps
WHOLE_TIMES, FLOW_TIMES = (20, 100, 250, 500, 999), (0.02, 0.1, 0.25, 0.5, 0.999)
ABAR = DDPMScheduler(**SD15).alphas_cumprod.double()
SCHEDULES: dict[str, Schedule] = {
    "epsilon": Diffusion(ABAR, "epsilon"),
    "v_prediction": Diffusion(ABAR, "v_prediction"),
    "flow": Flow(),
}


def gaussian_errors(schedule: Schedule, t: Tensor, *, order: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the signed relative errors [N, S] of the map of Gaussian latents to t [N], and the network calls [N]."""
    stds = STDS.view(1, -1, 1, 1)
    calls = torch.zeros(len(t))

    def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        calls[rows] += 1
        signal, noise = schedule.levels(time)
        variance = (signal * stds).square() + noise.square()
        return schedule.target(signal * stds.square() * x / variance, noise * x / variance, time)

    x_0 = stds.expand(len(t), -1, 1, 1)  # of one standard deviation, so that x_t is the standard deviation too
    hops = inversion.exact(schedule, t, steps=steps, order=order)
    x_t = inversion.invert(predict, schedule, x_0, hops, lambda _: torch.empty(0))
    signal, noise = schedule.levels(t)
    exact = ((signal * stds).square() + noise.square()).sqrt()
    return (x_t / exact - 1).flatten(1), calls


def table(name: str, times: Sequence[float]) -> list[str]:
    """Return the rows of a Markdown table for one process: an error in percent for every time, order and steps."""
    schedule, t = SCHEDULES[name], torch.tensor(times)
    cells = [gaussian_errors(schedule, t, order=order, steps=steps) for order, steps in WAYS]
    rows = []
    for row, time in enumerate(times):
        numbers = [f"{100 * errors[row].square().mean().sqrt():.1f} ({int(calls[row])})" for errors, calls in cells]
        rows.append(f"| {name}, t = {time} | {' | '.join(numbers)} |")
    return rows


def main() -> None:
    """Print the errors in percent and, in brackets, the network calls for one image."""
    heads = [f"order {order}, {steps} steps" for order, steps in WAYS]
    lines = [f"| process | {' | '.join(heads)} |", "|---" * (len(WAYS) + 1) + "|"]
    for name in SCHEDULES:
        lines += table(name, FLOW_TIMES if name == "flow" else WHOLE_TIMES)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
