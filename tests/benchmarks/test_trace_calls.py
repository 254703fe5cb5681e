"""The trace of calls, on functions of the package that are counted by hand."""

from __future__ import annotations

import torch

from mmalign.losses.pairwise import Pair, dpo
from tests.benchmarks.trace_calls import summarize, traced


def test_traced_counts_own_functions() -> None:
    """Count `dpo`, and the margin of policy and of reference; torch's functions do not count."""
    scores = Pair(torch.zeros(2), torch.zeros(2))
    with traced() as calls:
        dpo(scores, scores, beta=1.0)
    dpo(scores, scores, beta=1.0)
    assert {code.co_name: number for code, number in calls.items()} == {"dpo": 1, "margin": 2}
    assert {**summarize(calls), "lines": 0} == {"calls": 3, "functions": 2, "files": 1, "lines": 0}
