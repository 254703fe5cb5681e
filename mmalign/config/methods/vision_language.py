"""Hyper-parameters of the methods for vision-language models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config.base import Choice, MethodConfig
from mmalign.config.evaluation import Combine, DecodingConfig, Rewards, check_combine
from mmalign.config.judged_losses import GroupLossConfig, LambdaRankLossConfig
from mmalign.config.methods.kinds import ListMethodConfig, NumCachedDraws, ResponseMethodConfig, ThumbsMethodConfig
from mmalign.config.preparation import BdhsConfig


class MixedConfig(DecodingConfig):
    """Settings for pairs that the policy samples and an annotator orders."""

    max_new_tokens: int = Field(256, ge=1, description="maximum number of tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the answers")
    share: float = Field(0.5, ge=0, le=1, description="probability of replacing a pair of the data")
    annotator: str = Field(
        "rules",
        description="rules, or module:function: from a pair, its images and two answers to a number, positive if the "
        "first is better",
    )
    reward: Rewards | None = Field(
        None, description="judge of responses in place of the annotator, or a list of several"
    )
    combine: Combine = "sum"
    vocabulary: str = Field("refined", description="rules: refined or published (MSCOCO), crowds, or a JSON file")

    @model_validator(mode="after")
    def _one_annotator(self) -> MixedConfig:
        if self.reward is not None and self.annotator != type(self).model_fields["annotator"].default:
            raise ValueError("annotator and reward both order the answers; leave one out")
        check_combine(self.reward, self.combine)
        if self.combine == "zscore":
            raise ValueError(
                "combine: zscore would compare the two answers in units of the other pairs of their batch; use sum or "
                "vote"
            )
        return self


class BDHSMethodConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["bdhs"] = "bdhs"
    mode: Literal["offline", "online", "mixed"] = Field(
        "offline",
        description="the data's rejected responses, completions generated in training, or pairs of the policy's own "
        "answers for a share of the data",
    )
    gamma: float = Field(
        0.5, ge=0, le=1, description="weight of the rejected response, if there is a hallucinated one too"
    )
    online: BdhsConfig = BdhsConfig()
    mixed: MixedConfig = MixedConfig()

    @model_validator(mode="after")
    def _of_its_mode(self) -> BDHSMethodConfig:
        changed = {"online": self.online != BdhsConfig(), "mixed": self.mixed != MixedConfig()}
        for mode, is_set in changed.items():
            if is_set and mode != self.mode:
                raise ValueError(f"mode {self.mode} takes no settings of {mode!r}; leave them out")
        if self.mode == "mixed" and self.gamma != type(self).model_fields["gamma"].default:
            raise ValueError("mode mixed has one rejected response for each pair and takes no gamma; leave it out")
        if self.mode == "online" and self.gamma == 1:
            raise ValueError("mode online with gamma 1 does not use the generated responses; use mode: offline")
        if self.label_noise is not None and (self.mode == "mixed" or not self.gamma):
            option = f"mode {self.mode}" if self.mode == "mixed" else "gamma 0"
            raise ValueError(f"label_noise: {option} replaces the pairs that the data's labels are of; leave one out")
        return self


class DPOConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["dpo"] = "dpo"


class KTOConfig(ThumbsMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="in nats of a response")


class LiPOConfig(ListMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["lipo"] = "lipo"
    beta: float = Field(
        0.05, gt=0, description="in nats of a response; with loss: pro or rrhf a factor, of which the paper's is 1"
    )
    loss: Annotated[GroupLossConfig, Choice()] = Field(
        LambdaRankLossConfig(), description="loss of a list; docs/methods.md has their formulas"
    )


class MDPOConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["mdpo"] = "mdpo"
    delta: float = Field(0.0, description="anchor: required gain of the chosen response, in nats times beta")
    crop_area: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.01, 0.2],
        min_length=2,
        max_length=2,
        description="smallest and largest area of a crop, as fractions of the image",
    )
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _in_order(self) -> MDPOConfig:
        if self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"crop_area is {self.crop_area}; expected the smaller fraction first")
        return self


class POVIDConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the release's, except for its errors."""

    name: Literal["povid"] = "povid"
    gamma: float = Field(0.5, ge=0, le=1, description="weight of the rejected response; the noisy tokens have the rest")
    noise_step: int = Field(
        500, ge=0, lt=1000, description="diffusion timestep of the noise, of 1000; higher is noisier"
    )
    overflow: Literal["clamp", "wrap"] = Field(
        "clamp", description="handling of noisy pixels out of range; wrap as in the release"
    )
    tokens: Literal["policy", "reference", "own"] = Field(
        "policy",
        description="model whose noisy tokens both score: policy follows the paper, reference can be cached; own: each "
        "model its own, as in the release",
    )
    combine: Literal["average", "paper"] = Field(
        "average", description="mean of two losses, or one loss of a weighted sum"
    )
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _fixed(self) -> POVIDConfig:
        if self.num_cached_draws and self.tokens != "reference":
            raise ValueError(
                f"num_cached_draws: {self.num_cached_draws} cannot be cached, since the policy's noisy tokens change; "
                "use tokens: reference, or leave num_cached_draws out"
            )
        if self.label_noise is not None and (self.combine == "paper" or not self.gamma):
            option = "combine: paper" if self.combine == "paper" else "gamma 0"
            raise ValueError(f"label_noise: {option} has no loss of the data's pair alone; leave one out")
        return self


class ReAlignConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["realign"] = "realign"
    image_weight: float = Field(
        1.0, ge=0, description="weight of the term that prefers the right image; w_v in the paper"
    )
    rejected_scoring: Literal["written", "competitor"] = Field(
        "written",
        description="tokens scored for the rejected response and under the retrieved image: the written ones, or each "
        "model's likeliest others, as in the release",
    )


class ResponseSFTConfig(MethodConfig):
    """Hyper-parameters: none."""

    name: Literal["response_sft"] = "response_sft"


class RLHFVConfig(ResponseMethodConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["rlhfv"] = "rlhfv"
    beta: float = Field(
        0.5, gt=0, description="one over the unit of the scores: nats of a token, or with sums of a response"
    )
    score: Literal["auto", "sum", "mean"] = Field(
        "mean", description="weighted sum of log-probabilities, or this divided by the weights; sum as in the release"
    )
    gamma: float = Field(5.0, gt=0, description="weight of a changed token; 1 is DPO on means")
    min_block: int = Field(3, ge=1, description="tokens; shorter runs of equal tokens are treated as changed")
    insertions: bool = Field(True, description="treat words on only one side as changed")
