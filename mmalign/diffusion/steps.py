"""Sampler steps from x_t to the x at the previous time, with the densities of stochastic ones.

DDPM's processes take DDIM's step (arXiv:2010.02502, eq. 12 and 16). Flow matching takes the stochastic step of
Flow-GRPO (arXiv:2505.05470), which without noise is Euler's. `grid` and `step` hide the difference.

B is the number of rows; C, H, W are a latent's channels, height and width; S is the number of steps. All arithmetic is
float32.
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
        """Return the latents [B, C, H, W] for the given standard normal noise."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density [B] of latents, as the MEAN over their elements (SPO's unit), in nats."""
        z = (x.float() - self.mean) / self.std
        return -(0.5 * z.square()).flatten(1).mean(1) - self.std.log().flatten() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: Gaussian) -> Tensor:
        """Return the KL divergence [B] to a distribution with the same std, as the mean over elements, in nats."""
        return ((self.mean - other.mean) / self.std).square().flatten(1).mean(1) / 2


def grid(schedule: Schedule, steps: int) -> Tensor:
    """Return the times [S + 1] of a sampler with S steps, from the noise to the image.

    DDPM's times are T // S apart ("leading", offset 1, as in Stable Diffusion's samplers), and end with 0. SPO's
    release clamps the last step there too, so no step passes below the least noise of training. Flow: the times of the
    pipeline's sampler, so that a walk trains the sampler that generates.

    Raises:
        ValueError: there are more steps than the schedule allows.
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
            return schedule.times(steps)
    raise ValueError(f"steps: there is no stochastic step for a {type(schedule).__name__}")


def step(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float | None) -> Gaussian:
    """Return the distribution of x after one step.

    Args:
        schedule: the noise process.
        prediction: the network's (guided) answer at x_t [B, C, H, W], in its own parameterization.
        x_t: the step's start [B, C, H, W].
        t: the time at its start [B].
        prev: the time at its end [B], nearer to the image.
        eta: the amount of added noise. For DDPM's processes 1 adds as much as DDPM; for flow it is the published
            `noise_level`. None is 1 and 0.7. 0 is the deterministic step, with a std of 0 and no density.
    """
    prediction, x_t = prediction.float(), x_t.float()
    match schedule:
        case Diffusion():
            return _ddim(schedule, prediction, x_t, t, prev, 1.0 if eta is None else eta)
        case Flow():
            return _flow(prediction, x_t, t, prev, 0.7 if eta is None else eta)
    raise ValueError(f"steps: there is no stochastic step for a {type(schedule).__name__}")


def timestep(schedule: Schedule, t: Tensor) -> Tensor:
    """Convert times [B] to DDPM's timesteps, 0 to T - 1 or to T, for a reward model of noisy images."""
    return t * schedule.num_timesteps if isinstance(schedule, Flow) else t


def any_time(schedule: Schedule, rows: Sequence[int], rng: KeyedRNG) -> Tensor:
    """Draw a time for every row [B], uniform over all times, for values needed at every time on the way to an image.

    DDPM's networks are trained at such times. Those of flow matching are trained mostly at middle times, and hardly at
    nearly clean images (`Flow.draw_time`), where sampling ends.
    """
    return rng.uniform(rows, (), "time") if isinstance(schedule, Flow) else schedule.draw_time(rows, rng)


def _ddim(schedule: Diffusion, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float) -> Gaussian:
    """Return `sqrt(abar') x_0 + sqrt(1 - abar' - std^2) eps`, both predicted; std^2 is eta^2 times DDPM's variance."""
    signal, noise = schedule.levels(prev)
    std = eta * posterior_std((signal, noise), schedule.levels(t))
    clean, eps = schedule.to_clean(prediction, x_t, t), schedule.to_eps(prediction, x_t, t)
    return Gaussian(signal * clean + (noise.square() - std.square()).sqrt() * eps, std)


def _flow(velocity: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, noise_level: float) -> Gaussian:
    """Return the Euler-Maruyama step of the SDE with the flow's marginals: drift `v + g^2 / (2 t) (x + (1 - t) v)`.

    Its diffusion is `g^2 = noise_level^2 t / (1 - t)`, infinite at pure noise. There the next time replaces t in the 1
    - t of g.
    """
    sigma, sigma_prev = (time.float().view(-1, 1, 1, 1) for time in (t, prev))
    left = 1 - torch.where(sigma == 1, sigma_prev, sigma)
    g2, dt = noise_level**2 * sigma / left, sigma_prev - sigma
    mean = x_t * (1 + g2 / (2 * sigma) * dt) + velocity * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
    return Gaussian(mean, (-g2 * dt).sqrt())
