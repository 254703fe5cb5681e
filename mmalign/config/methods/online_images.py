"""Hyper-parameters of the methods that learn from images that the policy generates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmalign.config.base import LaggingConfig, MethodConfig, Section
from mmalign.config.methods.kinds import DenoisingMethodConfig, JudgedMethodConfig


class ImagesConfig(Section):
    """Images that the policy generates for the prompts of a batch."""

    images: int = Field(24, ge=2, description="images of a prompt; 24 as published for DiffusionNFT, AWM and DGPO")
    steps: int = Field(10, ge=1, description="of the sampler; 10 as published")
    guidance: float = Field(1.0, ge=1, description="guidance scale of the sampler; 1 as published for DiffusionNFT")
    batch_size: int = Field(16, ge=1, description="images that the network generates at a time")
    prompts_per_contrast: int | None = Field(
        None,
        ge=1,
        description="prompts whose images are learned from at a time, to save memory; default: all of a batch",
    )


class GenerationConfig(ImagesConfig):
    """Images that are learned from several times, under new noise."""

    eta: float | None = Field(
        0.0, ge=0, le=1, description="noise of a sampler's step: 0 is DDIM or Euler; null is 1, or 0.7 for flow models"
    )
    noisings: int = Field(
        4, ge=1, description="times that every image is noised and learned from, by later updates; ours (AWM: 6)"
    )


class TrajectoryConfig(ImagesConfig):
    """Images whose sampler steps are learned from."""

    guidance: float = Field(
        4.5, ge=1, description="guidance scale of policy and reference, in sampling and in the loss; as published"
    )
    eta: float | None = Field(
        None, gt=0, le=1, description="noise of a stochastic step; default as published: 0.7 for flow models, else 1"
    )
    window: int | None = Field(
        None,
        ge=1,
        description="successive steps that are stochastic and learned from, the first drawn for each prompt (MixGRPO: "
        "2); the others are deterministic. Default: all",
    )
    shared_start: bool = Field(
        False,
        description="start all images of a prompt from the same noise, as published for DanceGRPO, so that their "
        "rewards differ by the noise of stochastic steps alone",
    )

    @model_validator(mode="after")
    def _has_steps(self) -> TrajectoryConfig:
        if self.window is not None and self.window > self.steps:
            raise ValueError(f"window: {self.window} steps are more than the {self.steps} of the sampler; lower it")
        return self


class JudgedConfig(JudgedMethodConfig):
    """Judge and images of a method that generates its images."""

    generation: ImagesConfig = ImagesConfig()

    @property
    def uses_reference(self) -> bool:
        """True if the loss compares with a reference."""
        return True


class OnlineConfig(JudgedConfig):
    """Images of a method that noises what it has generated."""

    generation: GenerationConfig = GenerationConfig()


class AdvantageConfig(Section):
    """Conversion of rewards to advantages."""

    scale: Literal["group", "batch", "none"] = Field(
        "batch",
        description="standard deviation that divides: of a prompt's rewards, of the batch, as published for "
        "DiffusionNFT and DGPO, or none",
    )
    clip: float = Field(5.0, gt=0, description="largest advantage, in either direction; as published")


class AdvantageMethodConfig(OnlineConfig):
    """Advantages of a method that learns from all images of a prompt."""

    advantages: AdvantageConfig = AdvantageConfig()


class DivergenceConfig(MethodConfig):
    """Weight of the difference to the reference, which is loaded for it."""

    kl: float = Field(ge=0, description="weight of the squared difference to the reference's prediction")

    @property
    def uses_reference(self) -> bool:
        """True if the difference has a weight."""
        return self.kl > 0


class DiffusionOnlineDPOConfig(DenoisingMethodConfig, OnlineConfig):
    """Hyper-parameters; beta is Flow-Factory's for FLUX, in the range of Diffusion-DPO's."""

    name: Literal["diffusion_online_dpo"] = "diffusion_online_dpo"
    beta: float = Field(
        2000.0, gt=0, description="in units of -1/2 mean squared error; Flow-Factory takes 100 for Stable Diffusion 3.5"
    )

    @model_validator(mode="after")
    def _judged_by_no_person(self) -> DiffusionOnlineDPOConfig:
        if self.label_noise is not None and self.label_noise.annotators:
            raise ValueError("label_noise.annotators: a judge orders the generated images; leave it out")
        return self


class NFTConfig(DivergenceConfig, AdvantageMethodConfig):
    """Hyper-parameters; beta and kl are the release's."""

    name: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0, description="trust region: weight of the change since generation, less the share")
    weighting: Literal["none", "l1"] = Field(
        "none", description="l1 measures each error of x_0 in units of its mean size, as published"
    )
    kl: float = Field(1e-4, ge=0, description="weight of the squared difference to the reference's prediction")
    old: LaggingConfig | None = Field(
        None,
        description="lagging copy that generates the images and from which the trust region is measured; as published "
        "{mix: 0.5, ramp: 0.001}, with every the updates of a batch; default: the policy itself",
    )


class AWMConfig(DivergenceConfig, AdvantageMethodConfig):
    """Hyper-parameters; the defaults are the release's, with the generating policy for its moving average."""

    name: Literal["awm"] = "awm"
    measure: Literal["plain", "noise", "root"] = Field(
        "root", description="an error counts as it is, times the noise level, or as 4 times its fourth root times that"
    )
    clip: float | None = Field(1.0, gt=0, description="clipping range of the ratio around 1; null for none")
    trust: float = Field(1.0, ge=0, description="weight of the squared change of the prediction since generation")
    kl: float = Field(1e-3, ge=0, description="weight of the squared difference to the reference's prediction")


class DGPOConfig(AdvantageMethodConfig):
    """Hyper-parameters; beta is the release's for a fixed reference."""

    name: Literal["dgpo"] = "dgpo"
    beta: float = Field(100.0, gt=0, description="in units of the mean squared error; published from 10 to 100")
    clip: float | None = Field(
        0.05,
        gt=0,
        lt=1,
        description="change of exp(-error) since generation beyond which an image has no gradient; published from 1e-5 "
        "to 5e-2; null for none",
    )


class CRDConfig(AdvantageMethodConfig):
    """Hyper-parameters; the defaults are Flow-Factory's."""

    name: Literal["crd"] = "crd"
    beta: float = Field(1.0, gt=0, description="factor of the gains")
    kl: float = Field(
        0.1, ge=0, description="weight of the squared difference to the reference's prediction, for the best rewards"
    )
    least_kl: float = Field(1e-4, ge=0, description="the same for the worst rewards")
    reference_guidance: float = Field(4.5, ge=1, description="guidance scale of the reference's prediction")

    @property
    def uses_reference(self) -> bool:
        """True if the difference to the reference has a weight."""
        return self.kl > 0 or self.least_kl > 0


class FlowGRPOConfig(DivergenceConfig, JudgedConfig):
    """Hyper-parameters; the defaults are Flow-GRPO's, with the KL divergence in nats."""

    name: Literal["flow_grpo"] = "flow_grpo"
    generation: TrajectoryConfig = TrajectoryConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    clip: float = Field(1e-4, gt=0, lt=1, description="clipping range of a step's likelihood ratio around 1")
    kl: float = Field(
        0.004,
        ge=0,
        description="weight of a step's KL divergence to the reference, in nats per element; Flow-GRPO's 0.04 needs "
        "published_kl",
    )
    published_kl: bool = Field(
        False, description="multiply the divergence by the step's length, of 1 in all, as Flow-GRPO's release does"
    )
    guard: bool = Field(
        False,
        description="centre and scale the ratio, and divide the loss by the step's length, so that all steps count "
        "alike (GRPO-Guard)",
    )
