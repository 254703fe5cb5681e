"""Hyper-parameters of the methods for text-to-image models and for the step judge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config.base import MethodConfig
from mmalign.config.evaluation import RewardConfig
from mmalign.config.methods._shared import NumCachedDraws, PairMethodConfig


class CCAConfig(MethodConfig):
    """Hyper-parameters; none are published for diffusion, and the module's docstring derives these."""

    name: Literal["cca"] = "cca"
    beta: float = Field(2000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    weight: float = Field(1.0, ge=0, description="of unlearning another pair's prompt; lambda in the paper")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of images that lose both prompts; as released")


class DiffusionDPOConfig(PairMethodConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; diffusers' SD script has half of it"
    )
    caption_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that lose their prompt")
    num_cached_draws: NumCachedDraws = 0


class InPOConfig(PairMethodConfig):
    """Hyper-parameters; the defaults are the release's for SDXL, except for the inversion, which is exact.

    The paper does not name the model that inverts. The release, source of the published numbers, uses the policy. So
    does the derivation: its expectation is over latents of the policy. Policy and reference are equal at first; later
    the reference is an approximation, but a cacheable one.
    """

    name: Literal["inpo"] = "inpo"
    beta: float = Field(5000.0, gt=0, description="in units of -1/2 mean squared error; the release has 2000 for SD1.5")
    caption_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs that lose their prompt")
    inverter: Literal["policy", "reference"] = Field("policy", description="the model that inverts the images")
    inversion: Literal["exact", "release"] = Field(
        "exact", description="exact ends at t; release where the published program ends, on its grid around t"
    )
    steps: int = Field(10, ge=1, le=1000, description="of an inversion through all times; one to t takes its share")
    eta: float = Field(0.1, ge=0, le=1, description="how much of the noise is fresh; 0 inverts without any")
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _fixed(self) -> InPOConfig:
        if self.num_cached_draws and self.inverter != "reference":
            raise ValueError(
                f"num_cached_draws: {self.num_cached_draws} keeps what an inverter that learns would not make again; "
                "use "
                "inverter: reference, or leave it out"
            )
        return self


class InstructEngineConfig(PairMethodConfig):
    """Hyper-parameters; the paper's are unknown, and these are ours."""

    name: Literal["instruct_engine"] = "instruct_engine"
    beta: float = Field(5000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    weights: list[Annotated[float, Field(ge=0)]] = Field(
        [0.25] * 4,
        min_length=4,
        max_length=4,
        description="of the comparisons: prompts under the first image, and under the second; images under the first "
        "prompt, and under the second",
    )
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _compares(self) -> InstructEngineConfig:
        if not any(self.weights):
            raise ValueError("weights are all 0; expected at least one comparison to count")
        return self


class MaPOConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["mapo"] = "mapo"
    beta: float = Field(0.1, gt=0, description="the weight of the margin beside the chosen image's own error")
    snr: float | None = Field(
        None,
        gt=0,
        description="the factor inside the bounded score, a constant, whatever its name says; if not given, the "
        "release's 0.5, or what equals it in flow matching",
    )
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of pairs that lose their prompt")


class SFTConfig(MethodConfig):
    """Hyper-parameters."""

    name: Literal["sft"] = "sft"
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of images that lose their prompt")


class SPOConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's for Stable Diffusion 1.5."""

    name: Literal["spo"] = "spo"
    reward: RewardConfig = Field(description="scores the images that are predicted on the way, best a step_aware one")
    beta: float = Field(10.0, gt=0, description="in units of one over a mean log-probability")
    clip: float = Field(0.1, gt=0, lt=1, description="how far a likelihood ratio may go from 1 and still learn")
    steps: int = Field(20, ge=1, description="of the sampler")
    guidance: float = Field(5.0, ge=1, description="of policy and reference, in sampling and in the loss")
    eta: float | None = Field(
        None, gt=0, le=1, description="noise of a step; if not given, as published: 1, and of flow models 0.7"
    )
    candidates: int = Field(4, ge=2, description="next steps from one x_t")
    start: int = Field(4, ge=0, description="the step of the first candidates; earlier images cannot be told apart")
    inner_steps: int = Field(0, ge=0, description="steps that a candidate takes alone before it is scored; SDXL 3")
    threshold: float = Field(0.3, ge=0, lt=1, description="the difference of probability that makes a pair; SDXL 0.4")

    @model_validator(mode="after")
    def _whole_segments(self) -> SPOConfig:
        left, segment = self.steps - self.start, self.inner_steps + 1
        if left < 1 or left % segment:
            raise ValueError(
                f"steps {self.steps} less start {self.start} leaves {left} steps for segments of {segment} "
                "(inner_steps + 1); expected a multiple"
            )
        return self


class StepPreferenceConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's for Stable Diffusion 1.5."""

    name: Literal["step_preference"] = "step_preference"
    guidance: float = Field(5.0, ge=1, description="of the predictions, as in the sampling that the judge is for")
    reward: RewardConfig | None = Field(None, description="labels the pairs anew, by their clean images")
    tie_margin: float = Field(0.1, ge=0, lt=1, description="the difference of its probabilities that is no tie")
