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
        description="number of random draws per pair, used by the epochs in turn, so that reference scores are cached; "
        "0 redraws every epoch",
    ),
]


class PairMethodConfig(MethodConfig):
    """Pair loss of a method; the unit of `beta` is one over that of the method's scores."""

    beta: float = Field(gt=0, description="strength of the constraint to the reference")
    loss: Annotated[PairLossConfig, Choice()] = Field(
        DPOLossConfig(), description="pair loss; docs/methods.md has their formulas"
    )


class ResponseMethodConfig(PairMethodConfig):
    """Pair loss of a method that compares responses, with an optional likelihood term."""

    nll: float = Field(0.0, ge=0, description="weight of the chosen response's -log p, a mean over tokens")
