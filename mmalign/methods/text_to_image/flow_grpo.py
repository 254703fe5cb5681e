"""Flow-GRPO (arXiv:2505.05470; DanceGRPO, arXiv:2505.07818): policy gradients of the sampler's stochastic steps.

    x_T ~ N(0, 1);  x_(t-1) ~ N(mean(x_t), sigma_t^2) of the policy under guidance          K images of a prompt
    A = (R - mean R) / std R, clipped                                                       advantages of their rewards
    ratio = exp(log p(x_(t-1) | x_t) - log p_old(x_(t-1) | x_t))                            means over elements
    loss = mean_k max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) + kl KL(policy's step || reference's)

With `window` (MixGRPO, arXiv:2507.21802) only that many successive steps are stochastic and learned from; the first of
them is drawn for each prompt. With `shared_start` (DanceGRPO) all images of a prompt begin with the same x_T, so that
their rewards differ by the noise of the learned steps alone. `guard` (GRPO-Guard) centres and scales the logarithm of
the ratio, which becomes the mean of noise times change of the mean, and divides by the step's length.

Flow-GRPO's release multiplies the KL divergence by the step's length (`published_kl`). For DDPM's networks a step is
DDIM's with eta, and its length is its share of the timesteps.

B prompts, K images of each, W learned steps; [KB] are the first images of all prompts, then the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmalign.config.methods.online_images import FlowGRPOConfig as Config
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.noise import Gaussian
from mmalign.families.base import TextToImage
from mmalign.losses.advantages import advantages
from mmalign.losses.policy_gradient import clipped, is_clipped
from mmalign.methods import Requirements, Step
from mmalign.methods._generated import parts
from mmalign.methods.text_to_image._images import Guided, guided, policy_walk, predict_guided
from mmalign.methods.text_to_image._online import (
    Generated,
    by_prompt,
    judge_latents,
    judged_requirements,
    start_latents,
)
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Transitions:
    """Steps of the sampler, of [KB] images.

    Attributes:
        x_t: their starts [KB, C, H, W].
        t: the times at the starts [KB].
        prev: the times at the ends [KB].
        to: their ends [KB, C, H, W].
        text: the conditioning of the prompts [B].
    """

    x_t: Tensor
    t: Tensor
    prev: Tensor
    to: Tensor
    text: Guided


@dataclass(frozen=True)
class Contrast:
    """One step of each image, before the first update.

    Attributes:
        view: the steps.
        old: the policy's distribution of each step.
        reference: the reference's; None without a reference.
        advantages: [B, K].
        weights: weights of the prompts [B]; 0 if all their rewards are equal.
        summary: the step's, of all prompts of the batch.
    """

    view: Transitions
    old: Gaussian
    reference: Gaussian | None
    advantages: Tensor
    weights: Tensor
    summary: Mapping[str, Tensor]


@dataclass(frozen=True)
class Path:
    """Steps that are learned from.

    Attributes:
        first: index of the first [B].
        starts: where they start [W, K, B, C, H, W].
        means: means of the policy's distributions of their ends [W, K, B, C, H, W].
        stds: standard deviations of these [W, K, B, 1, 1, 1].
        ends: where they end [W, K, B, C, H, W].
    """

    first: Tensor
    starts: Tensor
    means: Tensor
    stds: Tensor
    ends: Tensor


def requirements(cfg: Config) -> Requirements:
    """Return the method's needs: prompts, a judge, and a reference for `kl`."""
    size = cfg.generation.window or cfg.generation.steps
    rows = 2 if cfg.generation.guidance == 1 else 4
    return judged_requirements(cfg, size, cfg.generation.images, rows_per_pair=rows)


def contrasts(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG) -> list[Contrast]:
    """Generate and judge the images of a batch, and return contrasts of their steps, from noise to image."""
    path, generated, times = sample_path(policy, batch, cfg, rng)
    scale, clip = cfg.advantages.scale, cfg.advantages.clip
    values = advantages(generated.rewards, scale=scale, clip=clip, weights=batch.weights, total=policy.total)
    contrasts, family, k = list[Contrast](), policy.family, cfg.generation.images
    # One step of the windows after another, each for some prompts
    for number in range(len(path.starts)):
        for part in parts(len(batch.rows), cfg.generation.prompts_per_contrast):
            # The windows of the prompts begin at steps of their own
            sub, index = batch[part], path.first[part] + number
            # [W, K, B, ...] -> [KB, ...]: this step of these prompts
            kept = (path.starts, path.means, path.stds, path.ends)
            starts, means, stds, ends = (x[number, :, part].flatten(0, 1) for x in kept)
            text = guided(family, sub, cfg.generation.guidance)
            view = Transitions(starts, times[index].repeat(k), times[index + 1].repeat(k), ends, text)
            reference = policy.on_reference(partial(step_law, family, cfg, view))
            weights = generated.weights[part]
            contrasts.append(Contrast(view, Gaussian(means, stds), reference, values[part], weights, generated.summary))
    return contrasts


def sample_path(
    policy: Policy[TextToImage], batch: EncodedPrompts, cfg: Config, rng: KeyedRNG
) -> tuple[Path, Generated, Tensor]:
    """Generate the images of a batch; return the steps to learn from, the judged images, and the sampler's times."""
    own, device = cfg.generation, batch.weights.device
    size = own.window or own.steps
    # A window of successive steps for each prompt, and the distance of every step from the window's first
    first = rng.integers(batch.rows, 0, own.steps - size + 1, "window").to(device)
    distance = torch.arange(own.steps, device=device)[:, None] - first  # [S, B]
    stochastic = (distance >= 0) & (distance < size)
    walk = policy_walk(
        policy,
        batch,
        rng,
        steps=own.steps,
        guidance=own.guidance,
        eta=own.eta,
        stochastic=stochastic,
        batch_size=own.batch_size,
    )
    x = start_latents(batch, own, rng, shared=own.shared_start)
    # Filled while the images are sampled, since each prompt has another window
    starts, means, ends = (x.new_zeros(size, *x.shape) for _ in range(3))
    path = Path(first, starts, means, x.new_zeros(size, *x.shape[:2], 1, 1, 1), ends)
    for index in range(own.steps):
        law = walk.law(x, index, walk.prediction(x, index))
        following = law.sample(walk.noise(len(x), index))
        # Prompts whose window has this step
        rows = stochastic[index].nonzero().flatten()
        for kept, values in ((path.starts, x), (path.means, law.mean), (path.stds, law.std), (path.ends, following)):
            # Indices around a slice put their own dimension first: [prompts, K, ...]
            kept[distance[index, rows], :, rows] = values[:, rows].transpose(0, 1)
        x = following
    return path, judge_latents(policy.family, batch, x), walk.times


def step_law(family: TextToImage, cfg: Config, view: Transitions, net: nn.Module) -> Gaussian:
    """Return a network's distribution of the ends of steps, under guidance."""
    rows = torch.arange(len(view.t), device=view.t.device) % len(view.text.cond)
    prediction = predict_guided(family, net, view.x_t, view.t, view.text[rows])
    return family.schedule.step(prediction, view.x_t, view.t, view.prev, cfg.generation.eta)


def loss(policy: Policy[TextToImage], contrast: Contrast, cfg: Config) -> Step:
    """Return the clipped loss of the steps, and their divergence from the reference's."""
    view, number, schedule = contrast.view, len(contrast.weights), policy.family.schedule
    law = step_law(policy.family, cfg, view, policy.model)
    # Length of each step, as a share of all timesteps
    length = (schedule.timestep(view.t) - schedule.timestep(view.prev)) / schedule.num_timesteps
    log_ratio = law.log_prob(view.to) - contrast.old.log_prob(view.to)
    if cfg.guard:
        # Less its mean and without its scale: noise times the change of the mean, on average over the elements
        log_ratio = (log_ratio + law.kl(contrast.old)) * law.std.flatten()
    ratio = by_prompt(log_ratio.exp(), number)
    losses = clipped(ratio, contrast.advantages, cfg.clip, cfg.clip)
    if cfg.guard:
        losses = losses / by_prompt(length, number)
    own = {"clipped": is_clipped(ratio, contrast.advantages, cfg.clip, cfg.clip).float()}
    if contrast.reference is not None:
        kl = by_prompt(law.kl(contrast.reference), number)
        losses = losses + cfg.kl * kl * (by_prompt(length, number) if cfg.published_kl else 1)
        own["kl"] = kl.detach()
    losses = losses.mean(1)
    metrics = {"loss": losses.detach(), **{name: values.mean(1) for name, values in own.items()}}
    return Step(losses, contrast.weights, metrics, contrast.summary)
