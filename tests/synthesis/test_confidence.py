"""Confidence of a judge in the best of several scores."""

import math

import pytest

from mmalign.synthesis.confidence import is_sure, log_odds


def test_log_odds_are_the_inverse_of_the_logistic_function() -> None:
    assert log_odds(0.5) == 0
    assert 1 / (1 + math.exp(-log_odds(0.9))) == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "least", "sure"),
    [
        ([1.0, 4.0, 2.0], 0.95, True),  # 0.953
        ([1.0, 4.0, 2.0], 0.96, False),
        ([0.0, 1e-9], 0.5, True),
        ([2.0, 2.0], 0.5, False),  # prefers nothing
        ([2.0], 0.5, False),
    ],
)
def test_the_best_is_compared_with_the_worst(scores: list[float], least: float, sure: bool) -> None:
    assert is_sure(scores, least) is sure
