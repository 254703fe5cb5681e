"""Losses that a recipe can choose: one config per loss, which names its function and declares its hyper-parameters.

The subclasses of a kind, such as `PairLossConfig`, are the choices of a field of that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from mmalign.config.base import Choice, Section
from mmalign.registry import check_known, is_outside

Score = Literal["sum", "mean"]  # reduction of the log-probabilities of a response's tokens


class LossConfig(Section):
    """Loss with its hyper-parameters: the fields besides `name` are keyword arguments of the function.

    Attributes:
        module: the module with the functions of the kind's losses, by name.
        function: the function of a loss from outside, as "module:function".
    """

    module: ClassVar[str]
    function: ClassVar[str] = ""

    name: str

    @property
    def location(self) -> str:
        """Function, as "module:function".

        Raises:
            ValueError: a loss from outside names none.
        """
        if not self.function and is_outside(self.name):
            raise ValueError(f"method.loss: {self.name} names no function; set function = 'module:function' in it")
        return self.function or f"{self.module}:{self.name}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Hyper-parameters that the function takes."""
        return self.model_dump(exclude={"name"})


class PairLossConfig(LossConfig):
    """Loss of policy and reference scores of chosen and rejected sides.

    Attributes:
        score: the scores of responses that the loss is made for.
        reference: whether the loss compares with a reference.
        responses_only: the reason why the loss does not take denoising scores; empty if it does.
        reads_preference: the function takes the preference of a pair's label; other losses are mixed by it.
    """

    module = "mmalign.losses.pairwise"
    score: ClassVar[Score] = "sum"
    reference: ClassVar[bool] = True
    responses_only: ClassVar[str] = ""
    reads_preference: ClassVar[bool] = False

    @property
    def likelihood(self) -> float:
        """Weight of the chosen side's own loss, which the methods add."""
        return 0.0


class DPOLossConfig(PairLossConfig):
    """Direct preference optimization: prefer the chosen side by more than the reference does."""

    name: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed fraction of swapped labels")


class IPOLossConfig(PairLossConfig):
    """Identity preference optimization: regression to a target margin, so that no margin grows without end."""

    score = "mean"

    name: Literal["ipo"] = "ipo"


class HingeLossConfig(PairLossConfig):
    """Hinge of SLiC and RSO: no gradient for pairs whose logit exceeds 1."""

    name: Literal["hinge"] = "hinge"


class RobustLossConfig(PairLossConfig):
    """Robust DPO: unbiased if a known fraction of the labels is swapped."""

    name: Literal["robust"] = "robust"
    flip_rate: float = Field(0.0, ge=0, lt=0.5, description="fraction of swapped labels")


class EXOLossConfig(PairLossConfig):
    """Efficient exact optimization: reverse KL to the smoothed label, which seeks its mode."""

    name: Literal["exo"] = "exo"
    label_smoothing: float = Field(0.001, gt=0, lt=0.5, description="smoothing of the label, above 0")


class NCALossConfig(PairLossConfig):
    """Noise contrastive alignment: keeps the chosen side from losing likelihood."""

    name: Literal["nca"] = "nca"


class BCOPairLossConfig(PairLossConfig):
    """Binary classification of each side by its own gain; part of MPO."""

    name: Literal["bco_pair"] = "bco_pair"


class APOZeroLossConfig(PairLossConfig):
    """Anchored preference for chosen sides better than the model's outputs: the chosen side gains."""

    name: Literal["apo_zero"] = "apo_zero"


class APODownLossConfig(PairLossConfig):
    """Anchored preference for chosen sides worse than the model's outputs: both sides lose."""

    name: Literal["apo_down"] = "apo_down"


class SPPOLossConfig(PairLossConfig):
    """Self-play preference: regression of each side's gain on its win rate, the label's preference."""

    reads_preference = True

    name: Literal["sppo"] = "sppo"


class SPPOHardLossConfig(PairLossConfig):
    """Self-play preference with win rates of 1 and 0."""

    name: Literal["sppo_hard"] = "sppo_hard"


class DiscoPOPLossConfig(PairLossConfig):
    """Discovered mix of a logistic and an exponential loss."""

    name: Literal["discopop"] = "discopop"
    temperature: float = Field(0.05, gt=0, description="temperature of the mixing gate, in units of the logit")


class DPOPLossConfig(PairLossConfig):
    """DPO-Positive: punishes a chosen side that falls below the reference."""

    name: Literal["dpop"] = "dpop"
    penalty: float = Field(50.0, ge=0, description="weight of the chosen side's lost likelihood; lambda in the paper")


class AnchorLossConfig(PairLossConfig):
    """mDPO's anchor, a part of sums: the chosen side has to gain."""

    name: Literal["anchor"] = "anchor"
    delta: float = Field(0.0, description="required gain of the chosen side, in units of the logit")


class SLiCLossConfig(PairLossConfig):
    """Ranking loss of SLiC-HF, without a reference and without beta."""

    reference = False

    name: Literal["slic"] = "slic"
    delta: float = Field(1.0, gt=0, description="margin without further gradient, in units of the scores")


class SimPOLossConfig(PairLossConfig):
    """Target margin on mean scores, without a reference."""

    score = "mean"
    reference = False

    name: Literal["simpo"] = "simpo"
    gamma: float = Field(0.5, ge=0, description="target of the logit; gamma_beta_ratio times beta in the release")


class CPOLossConfig(PairLossConfig):
    """DPO without a reference, plus the chosen side's own loss."""

    reference = False

    name: Literal["cpo"] = "cpo"
    alpha: float = Field(1.0, ge=0, description="weight of the chosen side's own loss, as nll or sft")

    @property
    def arguments(self) -> dict[str, Any]:
        """No hyper-parameters; the methods read `alpha`."""
        return {}

    @property
    def likelihood(self) -> float:
        """Weight of the chosen side's own loss."""
        return self.alpha


class ORPOLossConfig(PairLossConfig):
    """Likelihood of the chosen response plus a ratio of odds weighted by beta, without a reference."""

    score = "mean"
    reference = False
    responses_only = "it compares odds of probabilities, and a denoising score is not a log-probability"

    name: Literal["orpo"] = "orpo"


class LossTerm(Section):
    """Pair loss of a sum, with its weight."""

    weight: float = Field(1.0, gt=0, description="factor of the loss")
    loss: Annotated[PairLossConfig, Choice()]


class LossSum(Section):
    """Weighted sum of pair losses.

    Recipes map names to weights, `{dpo: 0.8, bco_pair: 0.2}`, or to a weight with hyper-parameters,
    `{dpo: 0.8, robust: {weight: 0.2, flip_rate: 0.1}}`.
    """

    terms: tuple[LossTerm, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_names(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "terms" in value:
            return value
        # A setting is a weight, or the options of the loss with its weight among them
        terms = []
        for name, setting in value.items():
            if not is_outside(name):
                check_known("there is no loss", name, Choice.sections(PairLossConfig))
            hyper = dict(setting) if isinstance(setting, Mapping) else {"weight": setting}
            weight = {"weight": hyper.pop("weight")} if "weight" in hyper else {}
            terms.append({**weight, "loss": {**hyper, "name": name}})
        return {"terms": tuple(terms)}

    @model_serializer
    def _as_names(self) -> dict[str, object]:
        settings = dict[str, object]()
        for term in self.terms:
            hyper = term.loss.model_dump(exclude={"name"})
            settings[term.loss.name] = {"weight": term.weight, **hyper} if hyper else term.weight
        return settings
