"""Hyper-parameters shared by the methods that learn from pairs, from thumbs or from lists, and by their judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config.base import Choice, MethodConfig, Section
from mmalign.config.evaluation import Combine, Rewards, check_combine
from mmalign.config.judged_losses import GroupLossConfig, KTOLossConfig, PlackettLuceLossConfig, UnpairedLossConfig
from mmalign.config.losses import DPOLossConfig, LossSum, LossTerm, PairLossConfig

NumCachedDraws = Annotated[
    int,
    Field(
        ge=0,
        description="number of random draws per pair, used by the epochs in turn, so that reference scores are cached; "
        "0 redraws every epoch",
    ),
]

LikedShare = Annotated[
    float | None,
    Field(
        gt=0,
        lt=1,
        description="share of liked outputs in an epoch: some of one label recur, with the same random numbers, and "
        "some of the other are left out; null takes each output once",
    ),
]


class LabelNoiseConfig(Section):
    """Rate of wrong labels that a run learns (LCPO); the defaults are ours, since the paper's are not verified."""

    start: float = Field(0.1, gt=0, lt=0.5, description="assumed fraction of wrong labels before the first update")
    speed: float = Field(0.1, gt=0, le=1, description="share of an update's estimate in the next rate")
    annotators: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="annotators with rates of their own, and their rates at the start; all others share one"
    )


class AutoBetaConfig(Section):
    """Beta that follows the margins, so that the mean gradient factor stays near a wish; the decay is ours."""

    gradient_factor: float = Field(0.2, gt=0, lt=0.5, description="sigma(-|z|) at the mean size of a logit")
    decay: float = Field(0.9, ge=0, lt=1, description="share of the past in the average size of a margin")


class JudgedMethodConfig(MethodConfig):
    """Judge of a method that generates what it learns from."""

    reward: Rewards = Field(description="judge of what the policy generates, or a list of several")
    combine: Combine = "sum"

    @model_validator(mode="after")
    def _combined(self) -> JudgedMethodConfig:
        check_combine(self.reward, self.combine)
        return self


class PairMethodConfig(MethodConfig):
    """Pair loss of a method; the unit of `beta` is one over that of the method's scores."""

    beta: float = Field(gt=0, description="strength of the constraint to the reference")
    loss: Annotated[PairLossConfig | LossSum, Choice()] = Field(
        DPOLossConfig(),
        description="pair loss, or weights of several, such as {dpo: 0.8, bco_pair: 0.2}; docs/methods.md has formulas",
    )
    divergence: Literal["reverse_kl", "js", "forward_kl", "alpha"] = Field(
        "reverse_kl", description="f-divergence to the reference"
    )
    divergence_alpha: float = Field(0.5, description="order of the divergence alpha; 0 is forward_kl, 1 is not defined")
    logit_cap: float | None = Field(None, gt=0, description="logit beyond which a pair has no gradient")

    label_noise: LabelNoiseConfig | None = Field(
        None, description="learn the rate of wrong labels and weigh labels by it (LCPO); {} takes the defaults"
    )
    auto_beta: AutoBetaConfig | None = Field(
        None, description="lower beta below method.beta while margins are large; {} takes the defaults"
    )

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Losses with their weights."""
        return self.loss.terms if isinstance(self.loss, LossSum) else (LossTerm(loss=self.loss),)

    @property
    def uses_reference(self) -> bool:
        """True if a loss of the sum compares with a reference."""
        return any(term.loss.reference for term in self.terms)

    @property
    def likelihood(self) -> float:
        """Weight of the chosen side's own loss that the losses bring with them."""
        return sum(term.weight * term.loss.likelihood for term in self.terms)

    @model_validator(mode="after")
    def _has_divergence(self) -> PairMethodConfig:
        # The first loss without a reference, if any
        free = next((term.loss.name for term in self.terms if not term.loss.reference), None)
        if self.divergence != "reverse_kl" and free is not None:
            raise ValueError(f"divergence: {self.divergence} needs a reference, which {free} has not; leave it out")
        if self.divergence != "alpha" and self.divergence_alpha != 0.5:
            raise ValueError(f"divergence_alpha: {self.divergence} takes none; leave it out, or use divergence: alpha")
        if self.auto_beta is not None and not self.uses_reference:
            raise ValueError(f"auto_beta: follows margins against a reference, which {free} has not; leave it out")
        # Automatic beta knows the margins of one divergence
        if self.auto_beta is not None and self.divergence != "reverse_kl":
            raise ValueError(
                f"auto_beta: follows margins of the reverse_kl, and divergence: {self.divergence} changes them; leave "
                "one out"
            )
        if self.divergence == "alpha" and self.divergence_alpha == 1:
            raise ValueError("divergence_alpha: 1 is not defined; its limit is divergence: reverse_kl")
        return self


class DenoisingMethodConfig(PairMethodConfig):
    """Pair loss of a method that compares denoising scores, with an optional term of the chosen images alone."""

    sft: float = Field(0.0, ge=0, description="weight of the chosen image's denoising error, as in RPO")

    @model_validator(mode="after")
    def _takes_denoising_scores(self) -> DenoisingMethodConfig:
        for term in self.terms:
            if term.loss.responses_only:
                raise ValueError(f"loss: {term.loss.name} does not fit images: {term.loss.responses_only}")
        if self.divergence in ("forward_kl", "alpha"):
            raise ValueError(
                f"divergence: {self.divergence} takes exponentials, which are biased on scores of one draw of noise; "
                "use reverse_kl or js"
            )
        return self


class ResponseMethodConfig(PairMethodConfig):
    """Pair loss of a method that compares responses, with an optional likelihood term."""

    beta: float = Field(
        0.1, gt=0, description="one over the unit of the scores: nats of a response, or with means of a token"
    )
    nll: float = Field(0.0, ge=0, description="weight of the chosen response's -log p, a mean over tokens")
    score: Literal["auto", "sum", "mean"] = Field(
        "auto",
        description="reduction of a response's log-probabilities; auto is what the loss is made for: mean for ipo, "
        "simpo and orpo, sum for others. dpo with mean is LN-DPO, and needs a beta larger by the length",
    )

    @property
    def mean(self) -> bool:
        """True for scores that are means over tokens; false for sums."""
        return self.score == "mean" or (self.score == "auto" and self.terms[0].loss.score == "mean")

    @model_validator(mode="after")
    def _has_score(self) -> ResponseMethodConfig:
        kinds = {term.loss.score: term.loss.name for term in self.terms}
        if self.score == "auto" and len(kinds) > 1:
            raise ValueError(
                f"score: {kinds['sum']} is made for sums over tokens and {kinds['mean']} for means; set sum or mean"
            )
        return self


class ThumbsMethodConfig(MethodConfig):
    """Unpaired loss of a method that learns from single outputs with labels."""

    beta: float = Field(gt=0, description="strength of the constraint to the reference")
    loss: Annotated[UnpairedLossConfig, Choice()] = Field(
        KTOLossConfig(), description="loss of a single output; docs/methods.md has their formulas"
    )
    liked_weight: float = Field(1.0, ge=0, description="factor of the loss of liked outputs")
    disliked_weight: float = Field(1.0, ge=0, description="factor of the loss of disliked outputs")
    liked_share: LikedShare = None

    @model_validator(mode="after")
    def _learns(self) -> ThumbsMethodConfig:
        if not (self.liked_weight or self.disliked_weight):
            raise ValueError("liked_weight and disliked_weight are both 0; expected one above 0")
        return self


class ListMethodConfig(MethodConfig):
    """Group loss of a method that learns from lists of outputs with scores."""

    beta: float = Field(gt=0, description="strength of the constraint to the reference")
    loss: Annotated[GroupLossConfig, Choice()] = Field(
        PlackettLuceLossConfig(), description="loss of a list; docs/methods.md has their formulas"
    )
