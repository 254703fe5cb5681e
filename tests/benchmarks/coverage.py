"""Coverage of the intervals of `mmalign.evaluation.statistics` on simulated data sets.

    python -m tests.benchmarks.coverage                     # the table of docs/statistics.md
    python -m tests.benchmarks.coverage --data-sets 200     # a shorter try

Images and prompts have rates of their own, from a beta distribution with mean p and intraclass correlation rho. A
correct interval of 95 % contains the true value in 95 % of the data sets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from mmalign.evaluation.metrics import f1
from mmalign.evaluation.statistics import (
    RATE,
    Interval,
    Measures,
    Values,
    cluster_jackknife,
    paired,
    paired_difference,
    proportion,
)

Simulated = tuple[Interval, float]  # an interval and the true value
Case = Callable[[np.random.Generator], Simulated]


@dataclass(frozen=True)
class Coverage:
    """Shares of intervals that contain the true value, end below it, and begin above it."""

    covered: float
    below: float
    above: float


def coverage(case: Case, num_data_sets: int, seed: int = 0) -> Coverage:
    """Return the coverage over simulated data sets."""
    rng = np.random.default_rng(seed)
    ends = [
        (interval.high - truth, interval.low - truth) for interval, truth in (case(rng) for _ in range(num_data_sets))
    ]
    highs, lows = np.array(ends).T
    below, above = float((highs < 0).mean()), float((lows > 0).mean())
    return Coverage(1 - below - above, below, above)


# --------------------------------------------------------------------------------------------------------- simulations


def rates(rng: np.random.Generator, mean: float, rho: float, shape: Any) -> Values:
    """Return rates from a beta distribution; two outcomes of the same rate have the correlation `rho`."""
    total = math.inf if rho == 0 else 1 / rho - 1
    return np.full(shape, mean) if rho == 0 else rng.beta(mean * total, (1 - mean) * total, shape)


def implicit_accuracy(rate: float, rho: float, prompts: int, pairs: int, rng: np.random.Generator) -> Simulated:
    """Simulate pairs in clusters of one prompt; if `pairs` is negative, clusters differ in size, with this mean."""
    sizes = rng.geometric(-1 / pairs, prompts) if pairs < 0 else np.full(prompts, pairs)
    groups = np.repeat(np.arange(prompts), sizes)
    outcomes = rng.random(len(groups)) < rates(rng, rate, rho, prompts)[groups]
    return proportion(outcomes, groups.tolist()), rate


def chair(rate: float, rho: float, images: int, rng: np.random.Generator) -> Simulated:
    """Simulate descriptions with 1 + Poisson(2.5) mentions, some of them invented."""
    mentions = 1 + rng.poisson(2.5, images)
    invented = rng.binomial(mentions, rates(rng, rate, rho, images))
    return _interval([np.stack([invented, mentions], axis=-1)], _ratio), rate


def pope_f1(rate: float, rho: float, images: int, rng: np.random.Generator) -> Simulated:
    """Simulate three questions with the answer yes and three with no about each image; `rate` of them are wrong."""
    wrong = rates(rng, rate, rho, images)
    missed, invented = rng.binomial(3, wrong), rng.binomial(3, wrong)
    counts = np.stack([3 - missed, 3 - missed + invented, np.full(images, 3)], axis=-1)
    return _interval([counts], lambda sums: f1(*np.moveaxis(sums, -1, 0))[None]), 1 - rate


def chair_change(before: float, after: float, images: int, rng: np.random.Generator) -> Simulated:
    """Simulate descriptions of the same images by two models; half of the images keep their difficulty."""
    own = rates(rng, before, 0.2, images)
    changed = np.where(rng.random(images) < 0.5, own * after / before, rates(rng, after, 0.2, images))
    mentions = 1 + rng.poisson(2.5, (2, images))
    invented = rng.binomial(mentions, np.stack([own, changed]))
    counts = np.stack([invented[0], mentions[0], invented[1], mentions[1]], axis=-1)
    (interval,) = cluster_jackknife([counts], paired(_ratio), bounds=[(-1.0, 1.0)])
    return interval, after - before


def outcome_change(gain: float, loss: float, prompts: int, seeds: int, rng: np.random.Generator) -> Simulated:
    """Simulate images of the same prompts by two models, of which some become right and others wrong."""
    gains, losses = rates(rng, gain, 0.2, (prompts, 1)), rates(rng, loss, 0.2, (prompts, 1))
    points = rng.random((prompts, seeds))
    gained, lost = points < gains, points > 1 - np.minimum(losses, 1 - gains)
    groups = np.repeat(np.arange(prompts), seeds).tolist()
    expected = _mean_loss(gain, loss)
    return paired_difference(lost.ravel(), gained.ravel(), groups), gain - expected


def mean_of_seeds(
    spread: float, prompts: int, images: int, change: bool, rng: np.random.Generator, num_seeds: int = 3
) -> Simulated:
    """Simulate runs with effects of their own (standard deviation `spread`) on prompts of different difficulty."""
    prompt_rates = 0.2 + 0.4 * rng.beta(1.2, 1.2, (1, prompts))  # in [0.2, 0.6], mean 0.4
    run_rates = prompt_rates + np.clip(rng.normal(0, spread, (num_seeds, 1)), -0.2, 0.2)
    run_rates = run_rates + rng.uniform(-0.1, 0.1, (num_seeds, prompts)) * (prompt_rates > 0.3)
    counts = np.stack([rng.binomial(images, np.clip(run_rates, 0, 1)), np.full((num_seeds, prompts), images)], axis=-1)
    if not change:
        return _interval(counts, _ratio), 0.4
    base = np.stack([rng.binomial(images, prompt_rates), np.full((1, prompts), images)], axis=-1)
    both = np.concatenate([np.repeat(base, num_seeds, axis=0), counts], axis=-1)
    (interval,) = cluster_jackknife(both, paired(_ratio), bounds=[(-1.0, 1.0)])
    return interval, 0.0


def _interval(counts: Any, measure: Measures) -> Interval:
    (interval,) = cluster_jackknife(counts, measure, bounds=[RATE])
    return interval


def _ratio(sums: Values) -> Values:
    """Return the ratio [1, ...] of two counts."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)[None]


@cache
def _mean_loss(gain: float, loss: float) -> float:
    """Return the mean of min(losses, 1 - gains), by numbers of its own."""
    rng = np.random.default_rng(1)
    return float(np.minimum(rates(rng, loss, 0.2, 10**6), 1 - rates(rng, gain, 0.2, 10**6)).mean())


# --------------------------------------------------------------------------------------------------------------- cases


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    simulations: dict[str, Case] = {}
    for rate, rho, prompts, pairs in (
        (0.62, 0.0, 40, 5), (0.62, 0.3, 40, 5), (0.62, 0.3, 20, 10), (0.62, 0.1, 100, 14), (0.62, 0.3, 10, 5),
        (0.5, 0.3, 40, 5), (0.9, 0.1, 40, 5), (0.9, 0.3, 20, 10), (0.62, 0.3, 20, -5), (0.62, 0.3, 60, -5),
    ):  # fmt: skip
        size = f"about {-pairs}" if pairs < 0 else str(pairs)
        name = f"implicit accuracy {rate:.0%}, {prompts} prompts x {size} pairs, rho {rho:g}"
        simulations[name] = partial(implicit_accuracy, rate, rho, prompts, pairs)
    for rho in (0.1, 0.3):
        for rate in (0.02, 0.03, 0.05, 0.1, 0.2):
            for images in (10, 30, 100, 300):
                simulations[f"CHAIR_i {rate:.0%}, {images} images, rho {rho:g}"] = partial(chair, rate, rho, images)
    for rate in (0.02, 0.03, 0.05, 0.1, 0.2):
        for images in (10, 25, 100, 300):
            simulations[f"F1 {1 - rate:.0%}, {images} images, rho 0.1"] = partial(pope_f1, rate, 0.1, images)
    for before, after in ((0.2, 0.1), (0.05, 0.05), (0.1, 0.05), (0.03, 0.02)):
        for images in (10, 30, 100, 300):
            name = f"change of CHAIR_i {before:.0%} to {after:.0%}, {images} images"
            simulations[name] = partial(chair_change, before, after, images)
    for gain, loss in ((0.1, 0.05), (0.2, 0.2), (0.3, 0.05)):
        for prompts, seeds in ((10, 2), (30, 4), (100, 2)):
            name = f"change of outcomes, {gain:.0%} gained and {loss:.0%} lost, {prompts} prompts x {seeds}"
            simulations[name] = partial(outcome_change, gain, loss, prompts, seeds)
    for change in (False, True):
        for spread in (0.0, 0.02, 0.05):
            for prompts, images in ((64, 1), (192, 2)):
                measured = "change" if change else "rate"
                name = f"mean {measured} of 3 seeds, spread {spread:.0%}, {prompts} prompts x {images}"
                simulations[name] = partial(mean_of_seeds, spread, prompts, images, change)
    return simulations


def main() -> None:
    """Print a Markdown table of all cases."""
    parser = argparse.ArgumentParser(description="Measure the coverage of 95 % intervals on simulated data sets.")
    parser.add_argument("--data-sets", type=int, default=2000, help="simulated data sets of each case")
    number = parser.parse_args().data_sets
    print("| case | covered, % | ends below, % | begins above, % |\n|---|---|---|---|")
    for name, case in cases().items():
        shares = coverage(case, number)
        print(
            f"| {name} | {100 * shares.covered:.1f} | {100 * shares.below:.1f} | {100 * shares.above:.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
