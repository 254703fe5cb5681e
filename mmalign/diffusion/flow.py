"""Flow matching: a straight line from the image to the noise, and its velocity (arXiv:2209.03003, 2403.03206).

Time t is the noise level sigma itself: float32 in [0, 1], where DDPM's timesteps are integers. A family converts t if
its network expects times in [0, 1000].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.diffusion.noise import Gaussian, Schedule
from mmalign.rng import KeyedRNG

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SamplerTimes = Callable[[int], Tensor]  # number of steps S -> times [S + 1], from 1 to 0


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: `x_t = (1 - t) x_0 + t eps`; the network predicts the velocity `eps - x_0`.

    Attributes:
        mean: the mean of the normal distribution whose sigmoid is a training time (arXiv:2403.03206, section 3.1).
        std: its standard deviation.
        shift: the shift of times towards noise, `shift t / (1 + (shift - 1) t)`, for large images (section 5.3.2).
        num_timesteps: the number of timesteps of the schedule that the network was trained on.
        sampler_times: the times of the pipeline's sampler, by their number of steps; None for even ones, shifted.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    num_timesteps: int = 1000
    sampler_times: SamplerTimes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin, mu: float, times: SamplerTimes, location: str) -> Flow:
        """Create the process of a diffusers scheduler, with training times logit-normal(0, 1) and shifted.

        The larger an image, the more noise it takes to hide as much of it (arXiv:2403.03206, section 5.3.2). A fixed
        shift, such as SD3's of 3, is the one of the model's training and sampling, and diffusers' training scripts use
        it too.

        Where the shift depends on the number of an image's tokens (FLUX, Qwen-Image), those scripts leave it out. They
        then train mostly where the sampler spends few of its steps. At 1024 pixels FLUX's sampler takes half of its
        steps above t = 0.76, and an eighth of the unshifted times lie there.

        Training here uses the sampler's shift for images of the size in training. FLUX's is 3.158 at 1024 pixels and
        1.878 at 512, where the mean training time is 0.63 instead of 0.72.

        Args:
            scheduler: the checkpoint's scheduler.
            mu: the shift in logits for the size in training, used if the scheduler shifts dynamically.
            times: the times of the pipeline's sampler, by their number of steps.
            location: the checkpoint, for error messages.

        Raises:
            ValueError: the scheduler is not one of flow matching.
        """
        config = scheduler.config
        if not is_flow(scheduler):
            raise ValueError(
                f"{location}: the scheduler is a {type(scheduler).__name__} that predicts "
                f"{config.get('prediction_type', 'nothing known')}; expected a FlowMatchEulerDiscreteScheduler or "
                "prediction_type: flow_prediction; correct scheduler/scheduler_config.json if the model was trained "
                "by flow matching"
            )
        # A fixed shift, or the one of the size in training
        shift = config.get("flow_shift", config.get("shift", 1.0))
        if config.get("use_dynamic_shifting"):
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        return cls(shift=float(shift), num_timesteps=config.num_train_timesteps, sampler_times=times)

    def times(self, steps: int) -> Tensor:
        """Return times from 1 to 0: those of the pipeline's sampler, or even ones, shifted.

        A walk thus trains the sampler that generates.
        """
        if self.sampler_times is not None:
            return self.sampler_times(steps)
        # In float64: with some shifts, float32 rounds the first time away from 1, which is pure noise.
        return self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()

    @property
    def epsilon_weight(self) -> float:
        """The mean of (1 - t)^2 over training times: the weight of a velocity error in units of an epsilon error."""
        u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # quantiles, the same everywhere
        t = self._shifted(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)))
        return float((1 - t).square().mean())

    def draw_time(self, rows: Sequence[int], rng: KeyedRNG, index: int = 0) -> Tensor:
        """Draw one time for every row, logit-normal, then shifted: [B], float32, in (0, 1)."""
        t = torch.sigmoid(self.mean + self.std * rng.normal(rows, (), "time", index))
        return self._shifted(t)

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - t and t, each [B, 1, 1, 1]."""
        t = t.float().view(-1, 1, 1, 1)
        return 1 - t, t

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the velocity `eps - x_0`, the same at every t."""
        return eps - x_0

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return `x_t + (1 - t) v`."""
        signal, _ = self.levels(t)
        return x_t + signal * prediction

    def to_clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return `x_t - t v`."""
        _, noise = self.levels(t)
        return x_t - noise * prediction

    def step(self, prediction: Tensor, x_t: Tensor, t: Tensor, prev: Tensor, eta: float | None) -> Gaussian:
        """Return the stochastic step of Flow-GRPO (arXiv:2505.05470), which without noise is Euler's.

        It is the Euler-Maruyama step of the SDE with the flow's marginals: drift `v + g^2 / (2 t) (x + (1 - t) v)`, and
        diffusion `g^2 = eta^2 t / (1 - t)`, infinite at pure noise. There the next time replaces t in the 1 - t of g.
        `eta` is the published `noise_level`, 0.7.
        """
        velocity, x_t = prediction.float(), x_t.float()
        sigma, sigma_prev = (time.float().view(-1, 1, 1, 1) for time in (t, prev))
        left = 1 - torch.where(sigma == 1, sigma_prev, sigma)
        g2, dt = (0.7 if eta is None else eta) ** 2 * sigma / left, sigma_prev - sigma
        mean = x_t * (1 + g2 / (2 * sigma) * dt) + velocity * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
        return Gaussian(mean, (-g2 * dt).sqrt())

    def timestep(self, t: Tensor) -> Tensor:
        """Return times of the length of DDPM's schedule."""
        return t * self.num_timesteps

    def any_time(self, rows: Sequence[int], rng: KeyedRNG) -> Tensor:
        """Draw uniform times: training's are mostly middle ones, and hardly of the nearly clean images at the end."""
        return rng.uniform(rows, (), "time")


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a diffusers scheduler's network predicts the velocity of a straight line."""
    euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    return euler or scheduler.config.get("prediction_type") == "flow_prediction"
