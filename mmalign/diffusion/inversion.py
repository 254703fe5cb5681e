"""Inversion: the way back from an image to the noise that a network would make it of, along the deterministic sampler
(DDIM, arXiv:2010.02502, eq. 12; for flow matching the ODE's Euler step).

From one place of a grid to the next, with signal and noise as in `Schedule.levels` and eps, x_0 as the network's answer
there tells them:

    x' = signal' * x_0 + sqrt(noise' ** 2 - sigma ** 2) * eps + sigma * z
    sigma = eta * (noise / noise') * sqrt(noise' ** 2 - (signal' / signal * noise) ** 2),   z ~ N(0, 1)

so that x' has the levels of its place whatever eta is. For flow matching without eta this is x' = x + (t' - t) v.

N rows, each with its own time; n of them still on their way; C, H, W a latent's channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.diffusion.noise import Schedule, posterior_std

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [n, C, H, W], time [n], rows [n]) -> the network's answer


@dataclass(frozen=True)
class Hop:
    """One step, of the rows that have not arrived.

    Attributes:
        rows: which ones they are of the batch, [n], int64.
        asked: the time that the network is told, [n].
        at: the time whose levels turn its answer into noise and image, [n].
        clean: whether the rows are still the images themselves, without any noise.
        signal: of the place that is reached, [n, 1, 1, 1].
        direction: the factor of the network's noise there, [n, 1, 1, 1].
        spread: that of fresh noise, [n, 1, 1, 1]; None without.
    """

    rows: Tensor
    asked: Tensor
    at: Tensor
    clean: bool
    signal: Tensor
    direction: Tensor
    spread: Tensor | None


def exact(schedule: Schedule, t: Tensor, *, steps: int, eta: float = 0.0) -> Iterator[Hop]:
    """The way to exactly t [N] for every row, in equal hops of at most one `steps`-th of all times.

    It begins at the image without noise, where a network of whole timesteps is asked at 1: it has hardly learned 0,
    which its samplers leave out, and nothing is before it.
    """
    whole = not t.is_floating_point()
    number = (t * steps / (schedule.num_timesteps if whole else 1)).ceil().clamp(min=1)
    for i in range(int(number.max())):
        rows = (number > i).nonzero().flatten()
        here, target = (_place(t[rows], (i + j) / number[rows]) for j in (0, 1))
        signal, noise = schedule.levels(target)
        spread = None
        if eta and i:
            spread = eta * posterior_std(schedule.levels(here), (signal, noise))
            noise = (noise.square() - spread.square()).sqrt()
        asked = here.clamp(min=1) if whole else here
        yield Hop(rows, asked, asked, i == 0, signal, noise, spread)


def release(schedule: Schedule, t: Tensor, *, steps: int, eta: float = 0.0) -> Iterator[Hop]:
    """The way of the InPO release, by the DDIMInverseScheduler of diffusers 0.20: to the grid's place above t.

    With 10 steps of 1000 the network is asked at -99, 1, 101, ... while that is below t, and each answer leads 100
    further. So a row ends up to 99 above its t (or at 901, below it), and eta adds noise on top of the level.

    Raises:
        ValueError: the schedule has no whole timesteps.
    """
    if t.is_floating_point():
        raise ValueError(
            "method.inversion: release is a grid of whole timesteps, which this model does not have; use exact"
        )
    stride = schedule.num_timesteps // steps
    for grid_time in range(1 - stride, 2 + (steps - 2) * stride, stride):
        rows = (t > grid_time).nonzero().flatten()
        if not len(rows):
            return
        asked = torch.full_like(t[rows], grid_time)
        here, target = asked.clamp(min=0), asked + stride
        signal, noise = schedule.levels(target)
        spread = eta * posterior_std(schedule.levels(here), (signal, noise)) if eta else None
        yield Hop(rows, asked, here, False, signal, noise, spread)


def invert(
    predict: Predict, schedule: Schedule, x_0: Tensor, hops: Iterator[Hop], fresh: Callable[[int], Tensor]
) -> Tensor:
    """x_t [N, C, H, W] at the end of every row's way.

    Args:
        predict: the network, asked for the rows of a hop alone.
        schedule: the process that it was trained on.
        x_0: images [N, C, H, W].
        hops: the way, by `exact` or `release`.
        fresh: standard normal numbers [N, C, H, W] of a hop by its number; called only where a hop has a spread.
    """
    x = x_0.clone()
    for number, hop in enumerate(hops):
        here = x[hop.rows]
        answer = predict(here, hop.asked, hop.rows).to(x.dtype)
        image = here if hop.clean else schedule.to_clean(answer, here, hop.at)
        reached = hop.signal * image + hop.direction * schedule.to_eps(answer, here, hop.at)
        if hop.spread is not None:
            reached = reached + hop.spread * fresh(number)[hop.rows]
        x[hop.rows] = reached
    return x


def implied_noise(schedule: Schedule, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """The eps [N, C, H, W] with which x_0 would be x_t: `(x_t - signal x_0) / noise`."""
    signal, noise = schedule.levels(t)
    return (x_t - signal * x_0) / noise


def _place(t: Tensor, share: Tensor) -> Tensor:
    """The time after a share of the way to t; whole where t is."""
    return t * share if t.is_floating_point() else (t * share).round().to(t.dtype)
