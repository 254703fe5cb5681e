"""Best of n: its divergence, the choice, and the seeds of the candidates."""

import math

import numpy as np
import pytest

from mmalign.evaluation.best_of import best_candidates, candidate_seeds, describe_bound, kl_bound


@pytest.mark.parametrize(
    ("n", "nats"),
    [(1, 0.0), (2, 0.193147181), (4, 0.636294361), (8, 1.204441542), (16, 1.835088722), (64, 3.174508083)],
)
def test_the_divergence_is_the_published_bound(n: int, nats: float) -> None:
    assert kl_bound(n) == pytest.approx(nats, abs=1e-9)


def test_the_divergence_is_that_of_continuous_outputs() -> None:
    """Without ties the best of n has the density n u^(n - 1) of the judge's quantile u, against a uniform one."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-8)


def test_the_best_of_the_first_n_is_chosen() -> None:
    scores = [[1.0, 5.0, 0.0], [3.0, 5.0, -1.0], [2.0, 4.0, 7.0]]
    assert best_candidates(scores, 2) == [1, 0, 0]  # the earliest of equal ones
    assert best_candidates(scores, 3) == [1, 0, 2]
    assert best_candidates(scores, 1) == [0, 0, 0]


def test_candidates_begin_with_the_image_and_share_no_seed() -> None:
    seeds = [7 * 1_000_003 + i for i in range(300)]
    candidates = candidate_seeds(seeds, 64)
    assert candidates[0] == seeds
    assert len({seed for row in candidates for seed in row}) == 64 * 300
    assert max(max(row) for row in candidates) < 2**63
    assert describe_bound(4) == f"KL <= {math.log(4) - 0.75:.2f} nats"
