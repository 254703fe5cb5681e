"""Losses of single outputs with labels, and of lists with scores, which a recipe can choose."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from mmalign.config.losses import LossConfig


class UnpairedLossConfig(LossConfig):
    """Loss of gains and labels; the fields besides `name` are settings of its baseline."""

    module = "mmalign.losses.unpaired"

    @property
    def arguments(self) -> dict[str, Any]:
        """No hyper-parameters; the methods read the baseline."""
        return {}

    def baseline(self, average: float) -> float:
        """Return the baseline that the loss reads, from the average gain of earlier updates."""
        return average

    def next_average(self, average: float, updates: int, gain: float) -> float:
        """Return the average gain after an update of mean gain `gain`, from the average of so many earlier updates."""
        return average


class KTOLossConfig(UnpairedLossConfig):
    """Kahneman-Tversky optimization."""

    name: Literal["kto"] = "kto"
    decay: float = Field(0.99, ge=0, lt=1, description="decay of the baseline, a moving average of the mean gain")

    def baseline(self, average: float) -> float:
        """Return the average, at least 0."""
        return max(average, 0.0)

    def next_average(self, average: float, updates: int, gain: float) -> float:
        """Return the moving average."""
        return self.decay * average + (1 - self.decay) * gain


class BCOLossConfig(UnpairedLossConfig):
    """Binary classifier optimization; the baseline is the mean gain of all updates."""

    name: Literal["bco"] = "bco"

    def next_average(self, average: float, updates: int, gain: float) -> float:
        """Return the mean of all updates."""
        return average + (gain - average) / (updates + 1)


class APOZeroUnpairedLossConfig(UnpairedLossConfig):
    """Anchored preference optimization of single outputs; it has no baseline."""

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"


class GroupLossConfig(LossConfig):
    """Loss of the scores and rewards of lists.

    Attributes:
        of_responses: the loss takes mean log-probabilities of responses, without a reference.
    """

    module = "mmalign.losses.groups"
    of_responses: ClassVar[bool] = False


class PlackettLuceLossConfig(GroupLossConfig):
    """Likelihood of the whole ranking."""

    name: Literal["plackett_luce"] = "plackett_luce"


class LambdaRankLossConfig(GroupLossConfig):
    """Pair losses, weighted by their effect on the ranking."""

    name: Literal["lambda_rank"] = "lambda_rank"
    ranks: Literal["policy", "reward"] = Field("policy", description="ranking whose discounts weigh the pairs")
    scaled: bool = Field(True, description="map the scores of each list linearly to 0..3")


class InfoNCALossConfig(GroupLossConfig):
    """Cross-entropy to the softmax of the scores."""

    name: Literal["info_nca"] = "info_nca"
    alpha: float = Field(1.0, gt=0, description="temperature of the scores")


class GroupNCALossConfig(GroupLossConfig):
    """Noise contrastive alignment with scores."""

    name: Literal["nca"] = "nca"
    alpha: float = Field(1.0, gt=0, description="temperature of the scores")


class CoPGLossConfig(GroupLossConfig):
    """Regression of centred gains to centred scores."""

    name: Literal["copg"] = "copg"


class D2OLossConfig(GroupLossConfig):
    """Worst output against the mean of the others."""

    name: Literal["d2o"] = "d2o"
    alpha: float = Field(1.0, ge=0, description="weight of the worst output")


class PROLossConfig(GroupLossConfig):
    """Preference ranking optimization, without a reference."""

    of_responses = True

    name: Literal["pro"] = "pro"
    nll: float = Field(0.05, ge=0, description="weight of the best response's -log p, times (K - 1)^2")


class RRHFLossConfig(GroupLossConfig):
    """Hinge of every two responses in the wrong order, without a reference."""

    of_responses = True

    name: Literal["rrhf"] = "rrhf"
    nll: float = Field(1.0, ge=0, description="weight of the best response's -log p, a mean over tokens")
