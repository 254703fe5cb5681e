"""Trajectories of a sampler from noise to images, with stochastic and deterministic steps.

B prompts and k latents of each; C, H, W are a latent's channels, height and width; S is the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.diffusion.noise import Gaussian, Schedule


@dataclass(frozen=True)
class Walk:
    """Sampler of one state of a network.

    Attributes:
        schedule: the noise process.
        times: the times [S + 1] of the steps, from noise to image, as `Schedule.times` returns them.
        predict: the (guided) answer [kB, C, H, W] of the network at latents [kB, C, H, W] and their times [kB].
        noise: standard normal numbers [k, B, C, H, W], given k and the index of a step.
        eta: the amount of noise of a stochastic step, as in `Schedule.step`; 0 for deterministic steps: DDIM's, or
            Euler's of flow matching.
        stochastic: mask [S, B] of stochastic steps; the others are deterministic. None for all.
    """

    schedule: Schedule
    times: Tensor
    predict: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[int, int], Tensor]
    eta: float | None = None
    stochastic: Tensor | None = None

    def prediction(self, x: Tensor, index: int) -> Tensor:
        """Return the network's answer [k, B, C, H, W] at latents [k, B, C, H, W], before step `index`."""
        flat = x.flatten(0, 1)
        return self.predict(flat, self.times[index].expand(len(flat))).view_as(x)

    def law(self, x: Tensor, index: int, prediction: Tensor) -> Gaussian:
        """Return the distribution of the latents after step `index`: mean [k, B, C, H, W], std [k, B, 1, 1, 1]."""
        # [k, B, ...] as one batch; all rows take the same step
        flat, answer = x.flatten(0, 1), prediction.flatten(0, 1)
        t, prev = (self.times[i].expand(len(flat)) for i in (index, index + 1))
        law = self.schedule.step(answer, flat, t, prev, self.eta)
        mean, std = law.mean.view_as(x), law.std.view(*x.shape[:2], 1, 1, 1)
        # Rows whose step adds no noise, by the same answer of the network
        if self.stochastic is not None:
            still = self.schedule.step(answer, flat, t, prev, 0.0).mean.view_as(x)
            noisy = self.stochastic[index].view(-1, 1, 1, 1)
            mean, std = torch.where(noisy, mean, still), torch.where(noisy, std, 0.0)
        return Gaussian(mean, std)

    def step(self, x: Tensor, index: int, prediction: Tensor, candidates: int = 1) -> Tensor:
        """Return the latents after step `index`: [k, B, ...] from [k, B, ...], or `candidates` from one [1, B, ...]."""
        return self.law(x, index, prediction).sample(self.noise(max(len(x), candidates), index))

    def path(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the latents [k, B, C, H, W] after each step from noise to image, beginning with `x`."""
        yield x
        for index in range(len(self.times) - 1):
            x = self.step(x, index, self.prediction(x, index))
            yield x
