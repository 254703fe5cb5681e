"""The share of a gradient that is signal: vectors with a known mean, and rows whose recipes load."""

import pytest
import torch

from tests.benchmarks import gradient_signal


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_share_of_the_mean(share: float) -> None:
    """Of vectors whose common part has this share of their mean squared length, in 20,000 dimensions."""
    rng = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(n, 20_000, generator=rng) for n in (1, 8))
    estimate = gradient_signal.signal(share**0.5 * mean + (1 - share) ** 0.5 * noise)
    assert estimate.estimate == pytest.approx(share, abs=0.02)
    assert estimate.low <= share + 1e-9 and estimate.high >= share - 1e-9


@pytest.mark.parametrize("row", gradient_signal.ROWS)
def test_rows_load(row: str) -> None:
    assert gradient_signal.load(row).train.gradient_accumulation_steps == 2
