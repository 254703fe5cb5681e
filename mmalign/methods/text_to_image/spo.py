"""SPO, step-by-step preference optimization (arXiv:2406.04314): which of several next steps leads to the better image?

    x_T ~ N(0, 1);  x_t from S - start stochastic steps of the policy under guidance
    x_{t-1}^1 ... x_{t-1}^K ~ N(mean(x_t), sigma_t^2)            candidates of one x_t
    score^k = judge(decode(x_0 predicted from x_{t-1}^k), prompt, t - 1)
    best and worst are a pair if softmax(best, worst) differ by more than the threshold
    x_{t-1} = a candidate drawn at random                        not the best: it goes on from what the policy does
    score = mean over elements of log N(x_{t-1}; mean, sigma_t^2)    for policy and reference, under guidance
    loss = -log sigma(beta * (clip(log ratio_best) - clip(log ratio_worst)))

With `inner_steps` (SDXL) each candidate goes on that many steps alone before it is judged, and every step that led to
the best is paired with the one of the same time that led to the worst; they share x_t in the first alone.

The loss is mean, not sum, over elements: `beta` and `clip` belong to that. A pair's reference scores are two numbers,
computed when it is made; the loss runs the policy once for both sides where they share x_t, so a pair costs two passes
(guidance doubles them) where the release takes eight with gradients for half of them. The release builds the list of
what it clips from a spent iterator, so that its gradients were never clipped: `train.max_grad_norm: null` does as it
did.

B prompts, K candidates, P pairs, M places that steps begin in; C, H, W a latent's channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mmalign.config import RewardConfig
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.steps import Gaussian, grid, step, timestep
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import repeat_rows, to_pil
from mmalign.families.types import Conditioning
from mmalign.losses import pairwise as losses
from mmalign.methods import Requirements, Step
from mmalign.methods._pair_loss import preference_step
from mmalign.methods.text_to_image._images import decode_images, predict_guided
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

modality = "text_to_image"

NO_SURE_PAIR = (
    "the reward model was sure of no pair; lower method.threshold, look at the reward model (method.reward), or begin "
    "later (method.start), where images can be told apart"
)


class Config(BaseModel):
    """Hyper-parameters; the defaults are the release's for Stable Diffusion 1.5."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

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
    start: int = Field(4, ge=0, description="the step of the first candidates; before it no judge can tell")
    inner_steps: int = Field(0, ge=0, description="steps that a candidate goes on alone before it is judged; SDXL 3")
    threshold: float = Field(0.3, ge=0, lt=1, description="the difference of probability that makes a pair; SDXL 0.4")

    @model_validator(mode="after")
    def _whole_segments(self) -> Config:
        left, segment = self.steps - self.start, self.inner_steps + 1
        if left < 1 or left % segment:
            raise ValueError(
                f"steps {self.steps} less start {self.start} leaves {left} steps for segments of {segment} "
                "(inner_steps + 1); expected a multiple"
            )
        return self


class Preferred(NamedTuple):
    """A pair of steps of one time.

    Attributes:
        prompt: which of the batch.
        step_index: the number of the step.
        start: where they begin: one place [1, C, H, W], or the chosen step's and the rejected one's [2, C, H, W].
        to: where they lead [2, C, H, W], likewise.
    """

    prompt: int
    step_index: int
    start: Tensor
    to: Tensor


@dataclass(frozen=True)
class Transitions:
    """P pairs of steps as the networks are asked about them.

    Attributes:
        x_t: the places where steps begin [M, C, H, W].
        t: their times [M].
        prev: the times that the steps go to [M].
        cond: the conditioning [M].
        unconditional: the conditioning without a prompt [M].
        source: which place each step begins in [2P], the chosen ones first.
        to: where it leads [2P, C, H, W].
    """

    x_t: Tensor
    t: Tensor
    prev: Tensor
    cond: Conditioning
    unconditional: Conditioning
    source: Tensor
    to: Tensor


@dataclass(frozen=True)
class Contrast:
    """Pairs of steps, the reference's scores of them, weights [P], and the share of comparisons that made pairs."""

    view: Transitions
    reference: Scores | None
    weights: Tensor
    confident_fraction: float


def requirements(_: Config) -> Requirements:
    """State what the method needs."""
    return Requirements(prompts_only=True, hint_if_empty=NO_SURE_PAIR)


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Draw an image for every prompt, and compare its possible steps; pairs of all steps in an order drawn by key.

    Always `steps - start` contrasts of at most B pairs, so that every process has as many: the first ones have no pair,
    but a single one of weight 0, where the judge was not sure often enough.
    """
    pairs = list(preferred_steps(policy, batch, cfg, rng))
    num_comparisons = (cfg.steps - cfg.start) * int((batch.weights > 0).sum())
    order = rng.uniform(batch.rows, (cfg.steps,), "order")
    pairs.sort(key=lambda pair: float(order[pair.prompt, pair.step_index]))
    rest, full = iter(pairs), list[Contrast]()
    while chunk := list(islice(rest, len(batch.rows))):
        full.append(_contrast(policy, batch, cfg, chunk, 1.0, len(pairs) / num_comparisons))
    nowhere = torch.zeros(1, *batch.shape, device=batch.weights.device)
    nothing = [Preferred(0, cfg.start, nowhere, nowhere.repeat(2, 1, 1, 1))]
    # Empty ones first: a checkpoint is written after an update, where nothing of the batch is left.
    lacking = cfg.steps - cfg.start - len(full)
    return [_contrast(policy, batch, cfg, nothing, 0.0, 0.0) for _ in range(lacking)] + full


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """The clipped pair loss on the policy's and the reference's log-probabilities of the steps."""
    assert contrast.reference is not None, "spo needs a reference"
    policy_scores, reference_scores = step_scores(policy.family, cfg, contrast.view, policy.model), contrast.reference
    link = partial(losses.clipped_dpo, beta=cfg.beta, clip=cfg.clip)
    with torch.no_grad():
        ratios = torch.stack([(policy_scores[side] - reference_scores[side]).exp() for side in ("chosen", "rejected")])
        clipped = ((ratios - 1).abs() > cfg.clip).float().mean(0)
        more = {"clipped": clipped, "sure": torch.full_like(clipped, contrast.confident_fraction)}
    return preference_step(link, cfg.beta, policy_scores, reference_scores, contrast.weights, more)


def step_scores(family: TextToImage, cfg: Config, view: Transitions, net: nn.Module) -> Scores:
    """The mean log-probability [P] of the chosen and the rejected steps, by one guided prediction for each place."""
    prediction = predict_guided(family, net, view.x_t, view.t, view.cond, view.unconditional, cfg.guidance)
    law = step(family.schedule, prediction, view.x_t, view.t, view.prev, cfg.eta)
    chosen, rejected = Gaussian(law.mean[view.source], law.std[view.source]).log_prob(view.to).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def preferred_steps(
    policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG
) -> Iterator[Preferred]:
    """The pairs of steps that the judge is sure of, on the way of one image for every prompt."""
    walk = _Walk(policy, batch, cfg, rng)
    x = rng.normal(batch.rows, batch.shape, "start").to(walk.device)
    for step_index in range(cfg.start):
        x = walk.steps(x[None], step_index, walk.predict(x[None], step_index))[0]
    prediction, everyone = walk.predict(x[None], cfg.start), torch.arange(len(x), device=walk.device)
    for step_index in range(cfg.start, cfg.steps, cfg.inner_steps + 1):
        path, predictions = walk.branches(x, step_index, prediction)
        best, worst, sure = best_and_worst(walk.judged(path[-1], step_index + len(path), predictions), cfg.threshold)
        for b in (sure & (batch.weights > 0)).nonzero().flatten().tolist():
            sides = torch.stack([best[b], worst[b]])
            places = [x[b][None], *(place[sides, b] for place in path)]
            for k, (start, to) in enumerate(pairwise(places)):
                yield Preferred(b, step_index + k, start, to)
        survivor = rng.integers(batch.rows, 0, cfg.candidates, "survivor", step_index).to(walk.device)
        x = path[-1][survivor, everyone]
        prediction = predictions[survivor, everyone][None] if predictions is not None else prediction


def best_and_worst(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which of K candidates the judge likes best and least, and whether it is sure: three tensors [B] of scores [K, B].

    It is if the softmax over these two scores gives probabilities that differ by more than the threshold.
    """
    best, worst = scores.max(0), scores.min(0)
    return best.indices, worst.indices, torch.tanh((best.values - worst.values) / 2) > threshold


def _contrast(
    policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, pairs: list[Preferred], weight: float, sure: float
) -> Contrast:
    """Pairs put together, with the reference's scores."""
    device = batch.weights.device
    sizes = [len(pair.start) for pair in pairs]
    first = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)  # each pair's first place among all
    last = first + torch.tensor(sizes) - 1
    numbers = torch.tensor([pair.step_index for pair in pairs]).repeat_interleave(torch.tensor(sizes))
    prompts = torch.tensor([pair.prompt for pair in pairs]).repeat_interleave(torch.tensor(sizes)).to(device)
    times, text = grid(policy.family.schedule, cfg.steps), batch.text[prompts]
    view = Transitions(
        x_t=torch.cat([pair.start for pair in pairs]),
        t=times[numbers].to(device),
        prev=times[numbers + 1].to(device),
        cond=policy.family.condition(text, batch.sizes[prompts]),
        unconditional=policy.family.condition(repeat_rows(batch.unconditional, len(text)), batch.sizes[prompts]),
        source=torch.cat([first, last]).to(device),
        to=torch.stack([pair.to for pair in pairs], 1).flatten(0, 1),
    )
    reference_scores = policy.on_reference(partial(step_scores, policy.family, cfg, view))
    return Contrast(view, reference_scores, torch.full((len(pairs),), weight, device=device), sure)


class _Walk:
    """Steps of the policy from a batch's noise to its images: rows are k for each of the B prompts, [k, B, ...]."""

    def __init__(self, policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> None:
        self.family, self.net, self.batch, self.cfg, self.rng = policy.family, policy.unwrapped, batch, cfg, rng
        self.device = batch.weights.device
        self.times = grid(self.family.schedule, cfg.steps).to(self.device)
        empty = repeat_rows(batch.unconditional, len(batch.rows))
        self.cond = self.family.condition(batch.text, batch.sizes)
        self.unconditional = self.family.condition(empty, batch.sizes)

    def predict(self, x: Tensor, step_index: int) -> Tensor:
        """The guided prediction [k, B, C, H, W] before step `step_index`."""
        k, flat = len(x), x.flatten(0, 1)
        cond, unconditional = self.cond.repeat(k), self.unconditional.repeat(k)
        t = self.times[step_index].expand(len(flat))
        prediction = predict_guided(self.family, self.net, flat, t, cond, unconditional, self.cfg.guidance)
        return prediction.view_as(x)

    def steps(self, x: Tensor, step_index: int, prediction: Tensor, candidates: int = 1) -> Tensor:
        """Where step `step_index` leads, with noise by key: from [k, B, ...] to [k, B, ...], or from one to
        candidates.
        """
        k = max(len(x), candidates)
        t, prev = (self.times[i].expand(x.shape[0] * x.shape[1]) for i in (step_index, step_index + 1))
        law = step(self.family.schedule, prediction.flatten(0, 1), x.flatten(0, 1), t, prev, self.cfg.eta)
        noise = (
            self.rng.normal(self.batch.rows, (k, *self.batch.shape), "step", step_index).to(self.device).transpose(0, 1)
        )
        return law.mean.view_as(x) + law.std.view(*x.shape[:2], 1, 1, 1) * noise

    def branches(self, x: Tensor, step_index: int, prediction: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """All places [K, B, C, H, W] on the candidates' ways, and the predictions at their ends; none for images."""
        path = [self.steps(x[None], step_index, prediction, self.cfg.candidates)]
        for k in range(step_index + 1, step_index + 1 + self.cfg.inner_steps):
            path.append(self.steps(path[-1], k, self.predict(path[-1], k)))
        end = step_index + len(path)
        return path, self.predict(path[-1], end) if end < self.cfg.steps else None

    def judged(self, x: Tensor, step_index: int, prediction: Tensor | None) -> Tensor:
        """The judge's scores [K, B] of the clean images predicted before step `step_index`, or of finished ones."""
        assert self.batch.reward_model is not None, "spo needs a judge"
        schedule, flat = self.family.schedule, x.flatten(0, 1)
        t = self.times[step_index].expand(len(flat))
        clean = flat if prediction is None else schedule.to_clean(prediction.flatten(0, 1), flat, t)
        images = to_pil(decode_images(self.family, clean))
        scores = self.batch.reward_model(images, list(self.batch.prompts) * len(x), timestep(schedule, t))
        return scores.to(self.device).view(len(x), len(self.batch.rows))
