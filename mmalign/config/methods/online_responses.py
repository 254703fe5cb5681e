"""Hyper-parameters of the methods that learn from responses that the policy generates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmalign.config.evaluation import DecodingConfig
from mmalign.config.methods.kinds import JudgedMethodConfig, ResponseMethodConfig


class AnswersConfig(DecodingConfig):
    """Answers that the policy generates to the questions of a batch, and how often they are learned from."""

    answers: int = Field(8, ge=2, description="answers to a question; 8 as in TRL")
    max_new_tokens: int = Field(256, ge=1, description="maximum number of tokens of an answer, as in TRL")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; as in TRL")
    updates: int = Field(1, ge=1, description="times that the answers are learned from, by later updates; 1 as in TRL")
    questions_per_contrast: int | None = Field(
        None,
        ge=1,
        description="questions whose answers are learned from at a time, to save memory; default: all of a batch. With "
        "train.gradient_accumulation_steps of batch_size / questions_per_contrast a batch's answers are one update",
    )


class OnlineResponsesConfig(JudgedMethodConfig):
    """Judge and answers of a method that generates its responses."""

    generation: AnswersConfig = AnswersConfig()


class OnlineDPOConfig(ResponseMethodConfig, OnlineResponsesConfig):
    """Hyper-parameters; beta is TRL's."""

    name: Literal["online_dpo"] = "online_dpo"
    mixture: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the reference's logits in those that generate (IPO-MD, with loss: ipo; published 0.125 "
        "to 0.5); 0 generates from the policy alone",
    )
    base_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the model before training in the scores of a reference that moves (INPO, with loss: ipo "
        "and score: sum; its tau / eta, published 1/3); 0 leaves that reference alone",
    )

    @model_validator(mode="after")
    def _has_two_references(self) -> OnlineDPOConfig:
        if self.base_share and self.reference is None:
            raise ValueError(
                f"base_share: {self.base_share:g} mixes the model before training into a reference that moves, and "
                "without method.reference it is the reference; set method.reference, or leave base_share out"
            )
        if self.base_share and not self.uses_reference:
            raise ValueError("base_share: needs a loss with a reference; leave it out, or use loss: ipo")
        return self


class GRPOConfig(OnlineResponsesConfig):
    """Hyper-parameters; the defaults are the paper's."""

    name: Literal["grpo"] = "grpo"
    beta: float = Field(0.04, ge=0, description="weight of the KL divergence to the reference; 0 loads none, as in TRL")
    clip_low: float = Field(0.2, gt=0, lt=1, description="clipping range of the likelihood ratio below 1")
    clip_high: float = Field(0.2, gt=0, description="clipping range above 1; DAPO takes 0.28")
    importance: Literal["token", "sequence"] = Field(
        "token",
        description="likelihood ratio of each token, or the geometric mean of a response's (GSPO, whose clipping range "
        "is 3e-4 below and 4e-4 above)",
    )
    reduction: Literal["grpo", "dr_grpo", "dapo"] = Field(
        "grpo",
        description="mean over a response's tokens, then over responses; sum over tokens divided by max_new_tokens "
        "(Dr. GRPO); or mean over the tokens of all responses of an update (DAPO)",
    )
    advantages: Literal["group", "batch", "none", "leave_one_out"] = Field(
        "group",
        description="reward less the mean of the question's answers, in units of their standard deviation, of that of "
        "the batch, or as it is (Dr. GRPO); or less the mean of the other answers (RLOO)",
    )

    @model_validator(mode="after")
    def _of_sequences(self) -> GRPOConfig:
        if self.importance == "sequence" and self.reduction != "grpo":
            raise ValueError(
                f"reduction: {self.reduction} would weigh a response's ratio by its length; with importance: sequence "
                "use grpo"
            )
        return self


class RAFTConfig(OnlineResponsesConfig):
    """Hyper-parameters."""

    name: Literal["raft"] = "raft"
    select: Literal["best", "rejection"] = Field(
        "best",
        description="answers to train on: the best of each question (RAFT), or each with probability exp((reward - "
        "largest reward) / temperature) (RSO)",
    )
    temperature: float = Field(
        0.5, gt=0, description="rejection: in units of the reward; RSO's beta, of which the paper's is 0.5"
    )
