"""A peer's step with something wrong in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mmalign.benchmark import runs


def wrong_beta_of(loss: Any) -> Any:
    """The loss under twice the beta."""

    def wrong(run: runs.Run, batch: Any, draws: Any, switch: Any) -> Tensor:
        twice: Any = run.recipe.method
        twice = twice.model_copy(update={"beta": 2 * twice.beta})
        found: Tensor = loss(replace(run, recipe=run.recipe.model_copy(update={"method": twice})), batch, draws, switch)
        return found

    return wrong
