"""Hyper-parameters that methods with a pair loss share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmalign.config.base import Choice, MethodConfig
from mmalign.config.losses import DPOLossConfig, PairLossConfig

NumCachedDraws = Annotated[
    int,
    Field(
        ge=0,
        description="so many draws of a pair come again and again, epoch after epoch in turn, and what the reference "
        "makes of each is worked out once and kept on disk; 0 draws anew in every epoch",
    ),
]


class PairMethodConfig(MethodConfig):
    """Pair loss of a method; the unit of `beta` is one over that of the method's scores."""

    beta: float = Field(gt=0)
    loss: Annotated[PairLossConfig, Choice()] = DPOLossConfig()


class ResponseMethodConfig(PairMethodConfig):
    """Pair loss of a method that compares responses, with an optional likelihood term."""

    nll: float = Field(0.0, ge=0, description="the weight of the chosen response's own -log p, a mean over its tokens")
