"""Hyper-parameters that methods with a pair loss share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmalign.config.base import Section

NumCachedDraws = Annotated[
    int,
    Field(
        ge=0,
        description="so many draws of a pair come again and again, epoch after epoch in turn, and what the reference "
        "makes of each is worked out once and kept on disk; 0 draws anew in every epoch",
    ),
]


class PairLossConfig(Section):
    """Choice of the pair loss and its hyper-parameters; the unit of `beta` is one over that of the method's scores."""

    beta: float = Field(gt=0)
    loss: Literal["dpo", "ipo", "hinge", "robust"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="for loss: dpo")
    flip_rate: float = Field(0.0, ge=0, lt=0.5, description="for loss: robust")


class ResponseLossConfig(PairLossConfig):
    """Pair loss of methods that compare responses, with an optional likelihood term."""

    nll: float = Field(0.0, ge=0, description="the weight of the chosen response's own -log p, a mean over its tokens")
