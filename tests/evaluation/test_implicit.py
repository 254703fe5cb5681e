"""Implicit accuracy without a pair to score."""

from typing import Any, cast

import pytest

from mmalign.evaluation import implicit
from mmalign.policy import Policy


def test_no_pair_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match="there is no held-out pair to score"):
        implicit.accuracy(cast(Policy, None), list[Any](), draws=1, seed=0)
