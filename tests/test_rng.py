"""Draws depend on position alone: not on the batch, its order, or what was drawn before."""

import math

import pytest
import torch

from mmalign.rng import KeyedRNG

ROWS = [3, 2**63 - 1, 17]


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)])
def test_a_row_draws_the_same_in_any_company(shape: tuple[int, ...]) -> None:
    rng = KeyedRNG(seed=5, epoch=2)
    for kind in (rng.normal, rng.uniform, rng.gumbel):
        together = kind(ROWS, shape, "noise")
        assert together.shape == (3, *shape) and together.dtype == torch.float32
        assert torch.equal(kind(ROWS[::-1], shape, "noise"), together.flip(0))
        assert torch.equal(kind([17], shape, "noise")[0], together[2])


def test_every_part_of_the_key_counts() -> None:
    first = KeyedRNG(1, 2).normal([3], (4,), "noise", 5)
    others = [
        KeyedRNG(9, 2).normal([3], (4,), "noise", 5),
        KeyedRNG(1, 9).normal([3], (4,), "noise", 5),
        KeyedRNG(1, 2).normal([9], (4,), "noise", 5),
        KeyedRNG(1, 2).normal([3], (4,), "time", 5),
        KeyedRNG(1, 2).normal([3], (4,), "noise", 9),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(first, KeyedRNG(1, 2).normal([3], (4,), "noise", 5))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    KeyedRNG(0).normal(ROWS, (3,), "noise")
    assert torch.equal(torch.get_rng_state(), before)


def test_distributions_over_many_rows() -> None:
    """Moments within five standard errors, deviation / sqrt(n); Gumbel has mean 0.5772 and variance pi^2 / 6."""
    n = 4000
    rng, rows = KeyedRNG(0), range(n)
    for values, mean, deviation in (
        (rng.normal(rows, (), "a"), 0.0, 1.0),
        (rng.uniform(rows, (), "a"), 0.5, 1 / math.sqrt(12)),
        (rng.gumbel(rows, (), "a"), 0.5772157, math.pi / math.sqrt(6)),
        (rng.integers(rows, 10, 20, "a").float(), 14.5, math.sqrt(99 / 12)),
    ):
        assert abs(float(values.mean()) - mean) < 5 * deviation / math.sqrt(n)
        assert abs(float(values.std()) / deviation - 1) < 0.1
    integers = rng.integers(rows, 10, 20, "a")
    assert integers.dtype == torch.int64 and set(integers.tolist()) == set(range(10, 20))
    uniform = rng.uniform(rows, (), "a")
    assert uniform.min() >= 0 and uniform.max() < 1
