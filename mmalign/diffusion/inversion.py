"""Inversion of an image to noise along the deterministic sampler: DDIM, or the steps of a flow's ODE.

DDIM is eq. 12 of arXiv:2010.02502. From one place of a grid to the next, with signal and noise as in `Schedule.levels`,
and with eps and x_0 from the network's answer at that place:

    x' = signal' * x_0 + sqrt(noise' ** 2 - sigma ** 2) * eps + sigma * z
    sigma = eta * (noise / noise') * sqrt(noise' ** 2 - (signal' / signal * noise) ** 2),   z ~ N(0, 1)

so x' has the levels of its place for every eta. For flow matching without eta this is x' = x + (t' - t) v.

Both are Euler's step of one ODE, dy/du = eps - x_0 with y = x / (signal + noise) and u = noise / (signal + noise).
Heun's step, of order 2, takes the mean of the slopes at both ends:

    x~ = signal' * x_0 + noise' * eps,   c = (slope(x~) - slope(x)) / 2
    x_0 <- x_0 - u * c,   eps <- eps + (1 - u) * c

N is the number of rows, each with its own time; n is the number of rows still to invert. C, H, W are a latent's
channels, height, width.
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
    """One step of the rows that have not reached their time.

    Attributes:
        rows: their indices in the batch, [n], int64.
        asked: the time that the network receives, [n].
        at: the time whose levels turn its answer into noise and image, [n].
        clean: True if the rows are still the images themselves, without any noise.
        signal: the signal level of the step's end, [n, 1, 1, 1].
        direction: the factor of the network's noise there, [n, 1, 1, 1].
        spread: the factor of fresh noise there, [n, 1, 1, 1]; None adds none.
        end: the time of the step's end, [n], where Heun's step runs the network again; None for Euler's step.
    """

    rows: Tensor
    asked: Tensor
    at: Tensor
    clean: bool
    signal: Tensor
    direction: Tensor
    spread: Tensor | None
    end: Tensor | None = None


def exact(schedule: Schedule, t: Tensor, *, steps: int, eta: float = 0.0, order: int = 1) -> Iterator[Hop]:
    """Yield hops to exactly t [N] for every row.

    The hops are equally long, at most one `steps`-th of all times. With order 2 and whole timesteps as many hops end at
    t times the squares of 1/n, 2/n, ...: the noise grows with the root of a small t, so these are equal steps of noise.

    The first hop begins at the image without noise. A network of whole timesteps receives time 1 there, the first that
    its samplers use: it has hardly learned 0.

    Args:
        schedule: the process.
        t: the time of every row.
        steps: the number of hops through all times.
        eta: the fraction of fresh noise.
        order: 1 for Euler's steps, 2 for Heun's.
    """
    whole = not t.is_floating_point()
    number = (t * steps / (schedule.num_timesteps if whole else 1)).ceil().clamp(min=1)
    # Hop i moves the rows that need more than i; the others are at their t
    for i in range(int(number.max())):
        rows = (number > i).nonzero().flatten()
        here, target = (_place(t[rows], i + j, number[rows], order) for j in (0, 1))
        signal, noise = schedule.levels(target)
        # Fresh noise replaces a part of the network's, so that the level stays the place's
        spread = None
        if eta and i:
            spread = eta * posterior_std(schedule.levels(here), (signal, noise))
            noise = (noise.square() - spread.square()).sqrt()
        asked, end = (place.clamp(min=1) if whole else place for place in (here, target))
        yield Hop(rows, asked, asked, i == 0, signal, noise, spread, end if order == 2 else None)


def release(schedule: Schedule, t: Tensor, *, steps: int, eta: float = 0.0) -> Iterator[Hop]:
    """Yield the hops of the InPO release, by the DDIMInverseScheduler of diffusers 0.20: to the grid's place above t.

    With 10 steps of 1000 the network receives -99, 1, 101, ... while that is below t, and each hop is 100 long. So a
    row ends up to 99 above its t (or at 901, below it). eta adds noise on top of the level.

    Raises:
        ValueError: the schedule has no whole timesteps.
    """
    if t.is_floating_point():
        raise ValueError(
            "method.inversion: release needs a grid of whole timesteps, which this model does not have; use exact"
        )
    stride = schedule.num_timesteps // steps
    # The grid begins a stride below time 1; a row hops while the grid is below its t
    for grid_time in range(1 - stride, 2 + (steps - 2) * stride, stride):
        rows = (t > grid_time).nonzero().flatten()
        if not len(rows):
            return
        asked = torch.full_like(t[rows], grid_time)
        # Below time 0 there are the levels of time 0
        here, target = asked.clamp(min=0), asked + stride
        signal, noise = schedule.levels(target)
        spread = eta * posterior_std(schedule.levels(here), (signal, noise)) if eta else None
        yield Hop(rows, asked, here, False, signal, noise, spread)


def invert(
    predict: Predict, schedule: Schedule, x_0: Tensor, hops: Iterator[Hop], fresh: Callable[[int], Tensor]
) -> Tensor:
    """Return x_t [N, C, H, W] at the end of every row's hops.

    Args:
        predict: the network, called with the rows of a hop alone.
        schedule: the process that it was trained on.
        x_0: images [N, C, H, W].
        hops: the hops, by `exact` or `release`.
        fresh: a function from a hop's number to standard normal numbers [N, C, H, W], called only if it has a spread.
    """
    x = x_0.clone()
    for number, hop in enumerate(hops):
        here = x[hop.rows]
        # The answer as image and noise, and with Heun's step the mean of both ends
        answer = predict(here, hop.asked, hop.rows).to(x.dtype)
        image = here if hop.clean else schedule.to_clean(answer, here, hop.at)
        eps = schedule.to_eps(answer, here, hop.at)
        if hop.end is not None:
            image, eps = _corrected(predict, schedule, hop, hop.end, image, eps)
        # The levels of the hop's end
        reached = hop.signal * image + hop.direction * eps
        if hop.spread is not None:
            reached = reached + hop.spread * fresh(number)[hop.rows]
        x[hop.rows] = reached
    return x


def implied_noise(schedule: Schedule, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """Return the eps [N, C, H, W] that turns x_0 into x_t: `(x_t - signal x_0) / noise`."""
    signal, noise = schedule.levels(t)
    return (x_t - signal * x_0) / noise


def _corrected(
    predict: Predict, schedule: Schedule, hop: Hop, end: Tensor, image: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return image and noise [n, C, H, W] of Heun's step from those of Euler's."""
    # The network's answer at the end of Euler's step
    signal, noise = schedule.levels(end)
    ahead = signal * image + noise * eps
    answer = predict(ahead, end, hop.rows).to(ahead.dtype)
    slope = schedule.to_eps(answer, ahead, end) - schedule.to_clean(answer, ahead, end)
    # The mean slope through the same x
    change = (slope - (eps - image)) / 2
    signal, noise = schedule.levels(hop.at)
    share = torch.zeros_like(noise) if hop.clean else noise / (signal + noise)
    return image - share * change, eps + (1 - share) * change


def _place(t: Tensor, hop: int, number: Tensor, order: int) -> Tensor:
    """Return the time after a number of hops; whole times are at least one apart."""
    share = hop / number
    if t.is_floating_point():
        return t * share
    return (t * share**order).round().to(t.dtype).clamp(min=hop).minimum(t)
