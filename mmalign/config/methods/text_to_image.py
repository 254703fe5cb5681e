"""Hyper-parameters of the methods for text-to-image models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config.base import MethodConfig
from mmalign.config.evaluation import Rewards
from mmalign.config.methods.kinds import (
    DenoisingMethodConfig,
    LikedShare,
    ListMethodConfig,
    NumCachedDraws,
    ThumbsMethodConfig,
)


class CCAConfig(MethodConfig):
    """Hyper-parameters; none are published for diffusion, and the module's docstring derives these."""

    name: Literal["cca"] = "cca"
    beta: float = Field(2000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    weight: float = Field(1.0, ge=0, description="weight of unlearning another pair's prompt; lambda in the paper")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="fraction of images that lose both prompts; as released"
    )


class DiffusionDPOConfig(DenoisingMethodConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; diffusers' SD script uses half of it"
    )
    caption_dropout: float = Field(0.2, ge=0, le=1, description="fraction of pairs that lose their prompt")
    num_cached_draws: NumCachedDraws = 0


class DiffusionKTOConfig(ThumbsMethodConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["diffusion_kto"] = "diffusion_kto"
    beta: float = Field(
        2000.0, gt=0, description="in units of -1/2 mean squared error; the release's beta_dpo is half of it"
    )
    liked_share: LikedShare = 0.8
    caption_dropout: float = Field(0.0, ge=0, le=1, description="fraction of images that lose their prompt")
    num_cached_draws: NumCachedDraws = 0


class ImageListConfig(ListMethodConfig):
    """Hyper-parameters; beta is Diffusion-DPO's, to which the loss is equal with two images."""

    name: Literal["diffusion_lpo"] = "diffusion_lpo"
    beta: float = Field(5000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    caption_dropout: float = Field(0.2, ge=0, le=1, description="fraction of prompts that are dropped")
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _of_images(self) -> ImageListConfig:
        if self.loss.of_responses:
            raise ValueError(
                f"loss: {self.loss.name} compares log-probabilities of responses, and a denoising score is none; use "
                "plackett_luce, lambda_rank, info_nca, nca, copg or d2o"
            )
        return self


class InPOConfig(DenoisingMethodConfig):
    """Hyper-parameters; the defaults are the release's for SDXL, except for the inversion, which is exact.

    The paper does not name the model that inverts. The release, source of the published numbers, uses the policy. So
    does the derivation: its expectation is over latents of the policy. Policy and reference are equal at first; later
    the reference is an approximation, but a cacheable one.
    """

    name: Literal["inpo"] = "inpo"
    beta: float = Field(
        5000.0, gt=0, description="in units of -1/2 mean squared error; the release uses 2000 for SD1.5"
    )
    caption_dropout: float = Field(0.2, ge=0, le=1, description="fraction of pairs that lose their prompt")
    inverter: Literal["policy", "reference"] = Field("policy", description="model that inverts the images")
    inversion: Literal["exact", "release"] = Field(
        "exact", description="exact ends at t; release ends on the published program's grid around t"
    )
    steps: int = Field(
        10, ge=1, le=1000, description="steps of an inversion through all times; one to t takes its share of them"
    )
    order: Literal[1, 2] = Field(
        1, description="of an exact inversion's steps: 1 as published, 2 takes two network calls a step and errs less"
    )
    eta: float = Field(0.1, ge=0, le=1, description="fraction of fresh noise; 0 inverts without any")
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _fixed(self) -> InPOConfig:
        if self.num_cached_draws and self.inverter != "reference":
            raise ValueError(
                f"num_cached_draws: {self.num_cached_draws} cannot be cached, since the inverter (the policy) changes; "
                "use inverter: reference, or leave num_cached_draws out"
            )
        if self.order != 1 and self.inversion == "release":
            raise ValueError(
                f"order: {self.order} does not fit inversion: release, whose steps are of order 1; leave order out, or "
                "use inversion: exact"
            )
        return self


class InstructEngineConfig(DenoisingMethodConfig):
    """Hyper-parameters; the paper's are unknown, and these are ours."""

    name: Literal["instruct_engine"] = "instruct_engine"
    beta: float = Field(5000.0, gt=0, description="in units of -1/2 mean squared error, as Diffusion-DPO's")
    weights: list[Annotated[float, Field(ge=0)]] = Field(
        [0.25] * 4,
        min_length=4,
        max_length=4,
        description="weights of the comparisons: prompts for the first image, prompts for the second, images for the "
        "first prompt, images for the second",
    )
    num_cached_draws: NumCachedDraws = 0

    @model_validator(mode="after")
    def _compares(self) -> InstructEngineConfig:
        if not any(self.weights):
            raise ValueError("weights are all 0; expected at least one above 0")
        if self.label_noise is not None:
            raise ValueError("label_noise: both images of a pair fit their own prompts; leave it out")
        return self


class MaPOConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's."""

    name: Literal["mapo"] = "mapo"
    beta: float = Field(0.1, gt=0, description="weight of the margin term; the chosen image's error has weight 1")
    snr: float | None = Field(
        None,
        gt=0,
        description="constant factor inside the bounded score; default: the release's 0.5, or its equivalent in flow "
        "matching",
    )
    caption_dropout: float = Field(0.0, ge=0, le=1, description="fraction of pairs that lose their prompt")


class SFTConfig(MethodConfig):
    """Hyper-parameters."""

    name: Literal["sft"] = "sft"
    caption_dropout: float = Field(0.1, ge=0, le=1, description="fraction of images that lose their prompt")


class SPOConfig(MethodConfig):
    """Hyper-parameters; the defaults are the release's for Stable Diffusion 1.5."""

    name: Literal["spo"] = "spo"
    reward: Rewards = Field(
        description="reward model that scores the predicted images, best a step_aware one, or a list of several, whose "
        "weighted scores are added"
    )
    beta: float = Field(10.0, gt=0, description="in units of 1 / mean log-probability")
    clip: float = Field(0.1, gt=0, lt=1, description="clipping range of the likelihood ratio around 1")
    steps: int = Field(20, ge=1, description="of the sampler")
    guidance: float = Field(
        5.0, ge=1, description="guidance scale of policy and reference, in sampling and in the loss"
    )
    eta: float | None = Field(
        None, gt=0, le=1, description="noise of a step; default as published: 1, for flow models 0.7"
    )
    candidates: int = Field(4, ge=2, description="candidate next steps from one x_t")
    start: int = Field(4, ge=0, description="step of the first candidates; earlier images are too noisy to compare")
    inner_steps: int = Field(0, ge=0, description="steps of a candidate before it is scored; SDXL 3")
    threshold: float = Field(0.3, ge=0, lt=1, description="smallest probability difference of a pair; SDXL 0.4")

    @model_validator(mode="after")
    def _whole_segments(self) -> SPOConfig:
        left, segment = self.steps - self.start, self.inner_steps + 1
        if left < 1 or left % segment:
            raise ValueError(
                f"steps {self.steps} less start {self.start} leaves {left} steps for segments of {segment} "
                "(inner_steps + 1); expected a multiple"
            )
        return self
