"""Flow matching: a straight line from the image to the noise, and the velocity along it
(arXiv:2209.03003, 2403.03206).

Time t is the noise level sigma itself, in [0, 1]: float32, where DDPM's timesteps are integers. A network that wants
its time in [0, 1000] is told so by its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.diffusion.noise import Schedule
from mmalign.draws import Draws


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: `x_t = (1 - t) x_0 + t eps`; the network predicts the velocity `eps - x_0`.

    Attributes:
        mean: of the normal distribution whose sigmoid a training time is (arXiv:2403.03206, section 3.1).
        std: of the same.
        shift: moves times towards noise, `shift t / (1 + (shift - 1) t)`, as large images need it (section 5.3.2).
        num_timesteps: of the schedule that the network was trained on.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    num_timesteps: int = 1000

    def draw_time(self, rows: Sequence[int], draws: Draws, index: int = 0) -> Tensor:
        """One time for every row, logit-normal, then shifted: [B], float32, in (0, 1)."""
        t = torch.sigmoid(self.mean + self.std * draws.normal(rows, (), "time", index))
        return self.shift * t / (1 + (self.shift - 1) * t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t and t, each [B, 1, 1, 1]."""
        t = t.float().view(-1, 1, 1, 1)
        return 1 - t, t

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The velocity `eps - x_0`, which is the same at every t."""
        return eps - x_0

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`x_t + (1 - t) v`."""
        signal, _ = self.levels(t)
        return x_t + signal * prediction

    def to_clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`x_t - t v`."""
        _, noise = self.levels(t)
        return x_t - noise * prediction
