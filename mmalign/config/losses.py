"""Losses that a recipe can choose: one config per loss, which names its function and declares its hyper-parameters.

The subclasses of a kind, such as `PairLossConfig`, are the choices of a field of that type.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mmalign.config.base import Section


class LossConfig(Section):
    """Loss with its hyper-parameters: the fields besides `name` are keyword arguments of the function.

    Attributes:
        function: the function, as "module:function".
    """

    function: ClassVar[str]

    name: str


class PairLossConfig(LossConfig):
    """Loss of policy and reference scores of chosen and rejected sides.

    Attributes:
        per_token: responses are scored by the mean over their tokens, not by the sum.
    """

    per_token: ClassVar[bool] = False


class DPOLossConfig(PairLossConfig):
    """Direct preference optimization."""

    function = "mmalign.losses.pairwise:dpo"

    name: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed fraction of swapped labels")


class IPOLossConfig(PairLossConfig):
    """Identity preference optimization; its target margin is in the unit of the scores."""

    function = "mmalign.losses.pairwise:ipo"
    per_token = True

    name: Literal["ipo"] = "ipo"


class HingeLossConfig(PairLossConfig):
    """Hinge loss."""

    function = "mmalign.losses.pairwise:hinge"

    name: Literal["hinge"] = "hinge"


class RobustLossConfig(PairLossConfig):
    """Robust DPO."""

    function = "mmalign.losses.pairwise:robust"

    name: Literal["robust"] = "robust"
    flip_rate: float = Field(0.0, ge=0, lt=0.5, description="fraction of swapped labels")
