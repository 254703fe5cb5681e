"""Noise processes of diffusion models, the parameterizations of their networks' predictions, and samplers' steps.

Every process mixes a clean image with noise, `x_t = signal(t) x_0 + noise(t) eps`. Its network's answer at x_t yields
both, so code that uses `Schedule` alone holds for DDPM and for flow matching.

B is the number of rows; C, H, W are a latent's channels, height, width; T is the number of timesteps, S that of a
sampler's steps. All arithmetic is float32, whatever the network's precision. In bfloat16 the mean of squared errors
loses the signal of a preference (a logit off by 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.rng import KeyedRNG

PREDICTIONS = ("epsilon", "v_prediction")


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


class Schedule(ABC):
    """A noise process and its network's parameterization; t is a row's time, in the process's unit, 0 nearly clean."""

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """T, the length of the discrete schedule that the network was trained on."""

    @abstractmethod
    def draw_time(self, rows: Sequence[int], rng: KeyedRNG, index: int = 0) -> Tensor:
        """Draw a time for every row, as in training: [B]."""

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the image and of the noise, each [B, 1, 1, 1]."""

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the right answer at x_t."""

    @abstractmethod
    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's answer to a prediction of eps."""

    @abstractmethod
    def to_clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's answer to a prediction of x_0."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """Return the times [S + 1] of a sampler with S steps, from the noise to the image."""

    @abstractmethod
    def step(self, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float | None) -> Gaussian:
        """Return the distribution of x after one step of a sampler.

        Args:
            prediction: the network's (guided) answer at x_t [B, C, H, W], in its own parameterization.
            x_t: the step's start [B, C, H, W].
            t: the time at its start [B].
            prev: the time at its end [B], nearer to the image.
            eta: the amount of added noise; None for the published one. 0 is the deterministic step, with a std of 0 and
                no density.
        """

    def timestep(self, t: Tensor) -> Tensor:
        """Convert times [B] to DDPM's timesteps, 0 to T - 1 or to T, for a reward model of noisy images."""
        return t

    def any_time(self, rows: Sequence[int], rng: KeyedRNG) -> Tensor:
        """Draw a time for every row [B], uniform over all times, for values that are needed at all times of a sampler.

        DDPM's networks are trained at such times.
        """
        return self.draw_time(rows, rng)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t [B, C, H, W]."""
        signal, noise = self.levels(t)
        return signal * x_0 + noise * eps


@dataclass(frozen=True)
class Diffusion(Schedule):
    """The variance-preserving process of DDPM: `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`.

    Attributes:
        alphas_cumprod: abar [T], float32.
        prediction: the network's parameterization, "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction: str

    @classmethod
    def from_config(cls, config: Mapping[str, object], location: str) -> Diffusion:
        """Create the process that a diffusers scheduler's configuration describes.

        Raises:
            ValueError: the scheduler's prediction type is not one of `PREDICTIONS`.
        """
        from diffusers import DDPMScheduler

        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"{location}: the scheduler's prediction_type is {prediction!r}; expected {' or '.join(PREDICTIONS)}; "
                "correct scheduler/scheduler_config.json if the model was trained for one of them"
            )
        return cls(DDPMScheduler.from_config(dict(config)).alphas_cumprod.float(), str(prediction))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def draw_time(self, rows: Sequence[int], rng: KeyedRNG, index: int = 0) -> Tensor:
        """Draw one timestep for every row, uniform on {0, ..., T - 1}: [B], int64."""
        return rng.integers(rows, 0, self.num_timesteps, "time", index)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1]."""
        abar = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the right answer: eps, or the velocity `sqrt(abar) eps - sqrt(1 - abar) x_0` (arXiv:2202.00512)."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self.levels(t)
        return signal * eps - noise * x_0

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's answer to a prediction of eps."""
        if self.prediction == "epsilon":
            return prediction
        signal, noise = self.levels(t)
        return signal * prediction + noise * x_t

    def to_clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's answer to a prediction of x_0."""
        signal, noise = self.levels(t)
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal
        return signal * x_t - noise * prediction

    def times(self, steps: int) -> Tensor:
        """Return times T // S apart ("leading", offset 1, as in Stable Diffusion's samplers), that end with 0.

        SPO's release clamps the last step there too, so no step passes below the least noise of training.

        Raises:
            ValueError: there are more steps than the schedule allows.
        """
        if 2 * steps > self.num_timesteps:
            raise ValueError(
                f"steps: {steps} are too many for a schedule of {self.num_timesteps} timesteps; expected at most "
                f"{self.num_timesteps // 2}"
            )
        times = torch.arange(steps - 1, -1, -1) * (self.num_timesteps // steps) + 1
        return torch.cat([times, torch.zeros(1, dtype=times.dtype)])

    def step(self, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float | None) -> Gaussian:
        """Return DDIM's step (arXiv:2010.02502, eq. 12 and 16); an eta of 1, the default, adds as much noise as DDPM.

        It is `sqrt(abar') x_0 + sqrt(1 - abar' - std^2) eps`, both predicted; std^2 is eta^2 times DDPM's variance.
        """
        prediction, x_t = prediction.float(), x_t.float()
        signal, noise = self.levels(prev)
        std = (1.0 if eta is None else eta) * posterior_std((signal, noise), self.levels(t))
        clean, eps = self.to_clean(prediction, x_t, t), self.to_eps(prediction, x_t, t)
        return Gaussian(signal * clean + (noise.square() - std.square()).sqrt() * eps, std)


def posterior_std(levels: tuple[Tensor, Tensor], next_levels: tuple[Tensor, Tensor]) -> Tensor:
    """Return the standard deviation of x at `levels`, given the image and the noisier x at `next_levels`.

    Both arguments are (signal, noise). For a variance-preserving process the result is the square root of
    `(1 - a) / (1 - a') * (1 - a' / a)` with a = signal ** 2, eq. 16 of arXiv:2010.02502 at eta 1.
    """
    (signal, noise), (further_signal, further_noise) = levels, next_levels
    added = further_noise.square() - (further_signal / signal * noise).square()
    return noise / further_noise * added.clamp(min=0).sqrt()


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error [B] of every row, subtracted and averaged in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
