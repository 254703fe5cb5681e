"""Confidence of a judge in the best of several outputs to one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence


def log_odds(probability: float) -> float:
    """Return the score difference at which the preference for one output has this probability."""
    return math.log(probability / (1 - probability))


def is_sure(scores: Sequence[float], min_confidence: float) -> bool:
    """Return whether the best output beats the worst with probability `1 / (1 + exp(worst - best))` or more.

    Equal scores are never sure, since they prefer nothing. A difference of scores is a log-odds.
    """
    best, worst = max(scores), min(scores)
    return best > worst and best - worst >= log_odds(min_confidence)
