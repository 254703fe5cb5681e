"""SPO, step-by-step preference optimization (arXiv:2406.04314): which of several next steps leads to the better image?

    x_T ~ N(0, 1);  x_t by the first `start` stochastic steps of the policy, under guidance
    x_{t-1}^1 ... x_{t-1}^K ~ N(mean(x_t), sigma_t^2)            candidates of one x_t
    score^k = reward model(decode(x_0 predicted from x_{t-1}^k), prompt, t - 1)
    best and worst are a pair if softmax(best, worst) differ by more than the threshold
    x_{t-1} = a candidate drawn at random                        not the best: the trajectory stays the policy's
    score = mean over elements of log N(x_{t-1}; mean, sigma_t^2)    for policy and reference, under guidance
    loss = -log sigma(beta * (clip(log ratio_best) - clip(log ratio_worst)))

With `inner_steps` (SDXL) each candidate takes that many further steps before it is scored. Every step towards the best
candidate is paired with the step of the same time towards the worst. Only the first of these pairs shares x_t.

Log-probabilities are means over elements, not sums; `beta` and `clip` refer to means. A pair's reference scores are two
numbers, computed with the pair. If both sides share x_t, the loss runs the policy once for both. A pair thus costs two
passes (guidance doubles them); the release takes eight, half of them with gradients. The release builds its list of
parameters to clip from a spent iterator, so it never clips gradients; `train.max_grad_norm: null` reproduces that.

B prompts, K candidates, P pairs, M latents that steps start from; C, H, W a latent's channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmalign.config.methods.text_to_image import SPOConfig as Config
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.noise import Gaussian
from mmalign.diffusion.walk import Walk
from mmalign.families.base import TextToImage
from mmalign.losses import pairwise as losses
from mmalign.methods import Contrasts, Requirements, Step
from mmalign.methods._pair_loss import pair_of, preference_step
from mmalign.methods.text_to_image._images import Guided, guided, judge_images, policy_walk, predict_guided
from mmalign.policy import Policy, Scores
from mmalign.rng import KeyedRNG

NO_SURE_PAIR = (
    "the reward model was not sure of any pair; lower method.threshold, look at the reward model "
    "(method.reward), or start later (method.start), where images are less noisy"
)


class Preferred(NamedTuple):
    """Chosen and rejected step at one time.

    Attributes:
        prompt: the prompt's index in the batch.
        step_index: the index of the step.
        start: the latents that the steps start from: a shared one [1, C, H, W], or chosen and rejected [2, C, H, W].
        to: the latents that they lead to [2, C, H, W], chosen first.
    """

    prompt: int
    step_index: int
    start: Tensor
    to: Tensor


@dataclass(frozen=True)
class Transitions:
    """P pairs of steps, as inputs of the networks.

    Attributes:
        x_t: the latents that steps start from [M, C, H, W].
        t: their times [M].
        prev: the times that the steps lead to [M].
        text: the conditioning of all prompts of the batch [B].
        prompt: the index in `text` of each start's prompt [M].
        source: the index in `x_t` of each step's start [2P], chosen steps first.
        to: the latents that the steps lead to [2P, C, H, W].
    """

    x_t: Tensor
    t: Tensor
    prev: Tensor
    text: Guided
    prompt: Tensor
    source: Tensor
    to: Tensor


@dataclass(frozen=True)
class Contrast:
    """Pairs of steps, the reference's scores of them, weights [P], and the step's summary: the sure comparisons."""

    view: Transitions
    reference: Scores | None
    weights: Tensor
    summary: Mapping[str, Tensor]


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts alone, a reference and a reward model."""
    starts = 1 if cfg.inner_steps == 0 else 2  # of a pair, at most
    rows = starts if cfg.guidance == 1 else 2 * starts
    return Requirements(
        learns_from="prompts",
        vae_decoder=True,
        contrasts=partial(Contrasts, cfg.steps - cfg.start, rows_per_pair=rows),
        reward=cfg.reward,
        hint_if_empty=NO_SURE_PAIR,
    )


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate an image for every prompt and return contrasts of its preferred steps, in a random order keyed by row.

    The result always has `steps - start` contrasts of at most B pairs, so that every process has equally many. If the
    reward model gave too few pairs, the first contrasts hold a single pair of weight 0.
    """
    # Pairs of all steps, in random order
    pairs = list(preferred_steps(policy, batch, cfg, rng))
    number = torch.tensor([pair.prompt for pair in pairs], dtype=torch.long).bincount(minlength=len(batch.rows))
    summary = {"sure": (number / (cfg.steps - cfg.start)).to(batch.weights)[batch.weights > 0]}
    order = rng.uniform(batch.rows, (cfg.steps,), "order")
    pairs.sort(key=lambda pair: float(order[pair.prompt, pair.step_index]))
    # Contrasts of up to B pairs
    rest, full = iter(pairs), list[Contrast]()
    while chunk := list(islice(rest, len(batch.rows))):
        full.append(_contrast(policy, batch, cfg, chunk, 1.0, summary))
    nowhere = torch.zeros(1, *batch.shape, device=batch.weights.device)
    nothing = [Preferred(0, cfg.start, nowhere, nowhere.repeat(2, 1, 1, 1))]
    # Empty contrasts come first: a checkpoint is written after an update, when no contrast of the batch is left.
    lacking = cfg.steps - cfg.start - len(full)
    return [_contrast(policy, batch, cfg, nothing, 0.0, summary) for _ in range(lacking)] + full


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the clipped pair loss on the log-probabilities of the steps under policy and reference."""
    assert contrast.reference is not None, "spo needs a reference"
    policy_scores, reference_scores = step_scores(policy.family, cfg, contrast.view, policy.model), contrast.reference
    values = losses.clipped_dpo(*pair_of(policy_scores, reference_scores), beta=cfg.beta, clip=cfg.clip)
    with torch.no_grad():
        ratios = torch.stack([(policy_scores[side] - reference_scores[side]).exp() for side in ("chosen", "rejected")])
        clipped = ((ratios - 1).abs() > cfg.clip).float().mean(0)
    step = preference_step(values, cfg.beta, policy_scores, reference_scores, contrast.weights, {"clipped": clipped})
    return replace(step, summary=contrast.summary)


def step_scores(family: TextToImage, cfg: Config, view: Transitions, net: nn.Module) -> Scores:
    """Return the mean log-probability [P] of chosen and rejected steps, with one guided prediction per start."""
    prediction = predict_guided(family, net, view.x_t, view.t, view.text[view.prompt])
    law = family.schedule.step(prediction, view.x_t, view.t, view.prev, cfg.eta)
    chosen, rejected = Gaussian(law.mean[view.source], law.std[view.source]).log_prob(view.to).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def preferred_steps(
    policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG
) -> Iterator[Preferred]:
    """Yield the pairs of steps in which the reward model is sure, along one trajectory for every prompt."""
    # Steps before the first candidates
    walk = policy_walk(policy, batch, rng, steps=cfg.steps, guidance=cfg.guidance, eta=cfg.eta)
    x = rng.normal(batch.rows, batch.shape, "start").to(walk.times.device)
    for step_index in range(cfg.start):
        x = walk.step(x[None], step_index, walk.prediction(x[None], step_index))[0]
    prediction, everyone = walk.prediction(x[None], cfg.start), torch.arange(len(x), device=x.device)
    for step_index in range(cfg.start, cfg.steps, cfg.inner_steps + 1):
        # Candidates, and the pairs of steps that led to the best and the worst
        path, predictions = _branches(walk, x, step_index, prediction, cfg)
        scores = _judge(policy.family, batch, path[-1], walk.times[step_index + len(path)], predictions)
        best, worst, sure = best_and_worst(scores, cfg.threshold)
        for b in (sure & (batch.weights > 0)).nonzero().flatten().tolist():
            sides = torch.stack([best[b], worst[b]])
            places = [x[b][None], *(place[sides, b] for place in path)]
            for k, (start, to) in enumerate(pairwise(places)):
                yield Preferred(b, step_index + k, start, to)
        # The trajectory continues from a random candidate
        survivor = rng.integers(batch.rows, 0, cfg.candidates, "survivor", step_index).to(x.device)
        x = path[-1][survivor, everyone]
        prediction = predictions[survivor, everyone][None] if predictions is not None else prediction


def best_and_worst(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best and the worst candidate's index [B] and a mask of sure pairs [B], from scores [K, B].

    A pair is sure if the softmax over its two scores gives probabilities that differ by more than the threshold.
    """
    best, worst = scores.max(0), scores.min(0)
    # The difference of a softmax over two scores
    return best.indices, worst.indices, torch.tanh((best.values - worst.values) / 2) > threshold


def _contrast(
    policy: Policy[TextToImage],
    batch: EncodedPrompts,
    cfg: Config,
    pairs: list[Preferred],
    weight: float,
    summary: Mapping[str, Tensor],
) -> Contrast:
    """Return a contrast of the pairs, with the reference's scores."""
    device = batch.weights.device
    # Index of every pair's first and last start among all M starts
    sizes = [len(pair.start) for pair in pairs]
    first = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    last = first + torch.tensor(sizes) - 1
    # Step index and prompt index of every start
    numbers = torch.tensor([pair.step_index for pair in pairs]).repeat_interleave(torch.tensor(sizes))
    prompts = torch.tensor([pair.prompt for pair in pairs]).repeat_interleave(torch.tensor(sizes)).to(device)
    times = policy.family.schedule.times(cfg.steps)
    view = Transitions(
        x_t=torch.cat([pair.start for pair in pairs]),
        t=times[numbers].to(device),
        prev=times[numbers + 1].to(device),
        text=guided(policy.family, batch, cfg.guidance),
        prompt=prompts,
        source=torch.cat([first, last]).to(device),
        to=torch.stack([pair.to for pair in pairs], 1).flatten(0, 1),
    )
    reference_scores = policy.on_reference(partial(step_scores, policy.family, cfg, view))
    return Contrast(view, reference_scores, torch.full((len(pairs),), weight, device=device), summary)


def _branches(
    walk: Walk, x: Tensor, step_index: int, prediction: Tensor, cfg: Config
) -> tuple[list[Tensor], Tensor | None]:
    """Return the candidates' latents [K, B, C, H, W] after each step, and the predictions at the last.

    The predictions are None after the sampler's last step.
    """
    path = [walk.step(x[None], step_index, prediction, cfg.candidates)]
    for k in range(step_index + 1, step_index + 1 + cfg.inner_steps):
        path.append(walk.step(path[-1], k, walk.prediction(path[-1], k)))
    end = step_index + len(path)
    return path, walk.prediction(path[-1], end) if end < cfg.steps else None


def _judge(family: TextToImage, batch: EncodedPrompts, x: Tensor, time: Tensor, prediction: Tensor | None) -> Tensor:
    """Return the reward model's scores [K, B] of the clean images predicted at a time.

    Without a prediction, `x` holds finished images.
    """
    schedule, flat = family.schedule, x.flatten(0, 1)
    t = time.expand(len(flat))
    clean = flat if prediction is None else schedule.to_clean(prediction.flatten(0, 1), flat, t)
    return judge_images(family, batch, clean, schedule.timestep(t)).view(len(x), len(batch.rows))
