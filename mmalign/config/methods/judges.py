"""Hyper-parameters of the methods for judges of images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmalign.config.base import MethodConfig
from mmalign.config.evaluation import Rewards


class BradleyTerryConfig(MethodConfig):
    """Hyper-parameters: the kind of the rows, and the weight of attributes."""

    name: Literal["bradley_terry"] = "bradley_terry"
    rows: Literal["pairs", "lists"] = Field(
        "pairs", description="pairs, or whole lists of images with scores, whose ranking has Plackett and Luce's loss"
    )
    attribute_weight: float = Field(
        1.0, ge=0, description="weight of the squared error of model.attributes, in units of half a scale"
    )


class StepPreferenceConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's for Stable Diffusion 1.5."""

    name: Literal["step_preference"] = "step_preference"
    guidance: float = Field(
        5.0, ge=1, description="guidance scale of the predictions, as in later sampling with the step judge"
    )
    reward: Rewards | None = Field(
        None,
        description="reward model that relabels the pairs by their clean images, or a list of several, whose weighted "
        "scores are added",
    )
    tie_margin: float = Field(0.1, ge=0, lt=1, description="smallest probability difference that is not a tie")
