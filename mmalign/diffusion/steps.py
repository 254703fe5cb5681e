"""Steps from noise to an image that draw: x_t to the x at the time before it, with a density.

Every process has one: DDIM's step for DDPM's (arXiv:2010.02502, eq. 12 and 16), and for flow matching the stochastic
step of Flow-GRPO (arXiv:2505.05470). Who takes `grid` and `step` need not know which.

B rows, C, H, W a latent's channels, height and width; S steps. All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.diffusion.flow import Flow
from mmalign.diffusion.noise import Diffusion, Schedule, posterior_std
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of latents with independent elements: mean [B, C, H, W], std [B, 1, 1, 1]."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents [B, C, H, W] at the given standard normal draws."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density [B] of latents, as the MEAN over their elements (SPO's unit), in nats."""
        z = (x.float() - self.mean) / self.std
        return -(0.5 * z.square()).flatten(1).mean(1) - self.std.log().flatten() - 0.5 * math.log(2 * math.pi)


def grid(schedule: Schedule, steps: int) -> Tensor:
    """The times [S + 1] of a sampler with S steps, from the noise to the image.

    DDPM's: spaced by T // S ("leading", offset 1, as Stable Diffusion's samplers have it), and 0 at the end, which is
    where the release of SPO clamps the last step; so no step goes past the training's least noise. Flow: sigma evenly
    from 1 to 0, then shifted.

    Raises:
        ValueError: there are more steps than the schedule can give.
    """
    match schedule:
        case Diffusion():
            if 2 * steps > schedule.num_timesteps:
                raise ValueError(
                    f"steps: {steps} are too many for a schedule of {schedule.num_timesteps} timesteps; expected at "
                    f"most {schedule.num_timesteps // 2}"
                )
            stride = schedule.num_timesteps // steps
            times = torch.arange(steps - 1, -1, -1) * stride + 1
            return torch.cat([times, torch.zeros(1, dtype=times.dtype)])
        case Flow():
            # In float64: some shifts would round the first time to a little more or less than 1, which is pure noise.
            sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return (schedule.shift * sigma / (1 + (schedule.shift - 1) * sigma)).float()
    raise ValueError(f"steps: there is no stochastic step for a {type(schedule).__name__}")


def step(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float | None) -> Gaussian:
    """Where a step goes.

    Args:
        schedule: the noise process.
        prediction: the network's (guided) answer at x_t [B, C, H, W], in its own parameterization.
        x_t: where it starts [B, C, H, W].
        t: the time there [B].
        prev: the time that it goes to [B], nearer to the image.
        eta: how much noise it adds, above 0: for DDPM's processes 1 is as much as DDPM does, for flow it is the
            published `noise_level`. None is 1 and 0.7.
    """
    prediction, x_t = prediction.float(), x_t.float()
    match schedule:
        case Diffusion():
            return _ddim(schedule, prediction, x_t, t, prev, 1.0 if eta is None else eta)
        case Flow():
            return _flow(prediction, x_t, t, prev, 0.7 if eta is None else eta)
    raise ValueError(f"steps: there is no stochastic step for a {type(schedule).__name__}")


def timestep(schedule: Schedule, t: Tensor) -> Tensor:
    """Times [B] in the unit of DDPM's timesteps, 0 to T - 1 or to T, which a judge of noisy images is told."""
    return t * schedule.num_timesteps if isinstance(schedule, Flow) else t


def any_time(schedule: Schedule, rows: Sequence[int], rng: KeyedRNG) -> Tensor:
    """A time for every row [B], uniform over all there are: for what is asked at each of them on the way to an image.

    DDPM's networks learn at such times; those of flow matching mostly at middling ones, and hardly at nearly clean
    images (`Flow.draw_time`), where a way to an image ends.
    """
    return rng.uniform(rows, (), "time") if isinstance(schedule, Flow) else schedule.draw_time(rows, rng)


def _ddim(schedule: Diffusion, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float) -> Gaussian:
    """`sqrt(abar') x_0 + sqrt(1 - abar' - std^2) eps`, both predicted; std^2 is eta^2 times DDPM's variance."""
    signal, noise = schedule.levels(prev)
    std = eta * posterior_std((signal, noise), schedule.levels(t))
    clean, eps = schedule.to_clean(prediction, x_t, t), schedule.to_eps(prediction, x_t, t)
    return Gaussian(signal * clean + (noise.square() - std.square()).sqrt() * eps, std)


def _flow(velocity: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, noise_level: float) -> Gaussian:
    """The Euler-Maruyama step of the SDE that has the flow's marginals: drift `v + g^2 / (2 t) (x + (1 - t) v)`.

    Its diffusion is `g^2 = noise_level^2 t / (1 - t)`, infinite at pure noise, where the next time stands in for t
    in the 1 - t of g.
    """
    sigma, sigma_prev = (time.float().view(-1, 1, 1, 1) for time in (t, prev))
    left = 1 - torch.where(sigma == 1, sigma_prev, sigma)
    g2, dt = noise_level**2 * sigma / left, sigma_prev - sigma
    mean = x_t * (1 + g2 / (2 * sigma) * dt) + velocity * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
    return Gaussian(mean, (-g2 * dt).sqrt())
