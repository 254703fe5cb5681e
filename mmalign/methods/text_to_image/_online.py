"""Images that the policy generates and a judge scores, learned from by the forward process.

    x_0^1 ... x_0^K ~ policy(prompt)                        K images of a prompt
    A^k = (R^k - mean R) / std R, clipped                   advantages of their rewards
    t, eps                                                  `noisings` times, one of each for all images of a prompt
    old^k = policy(x_t^k, t, prompt)                        before the first update
    reference^k = reference(x_t^k, t, prompt)

A method is a loss of one to three lines on the errors of these predictions (`mmalign/losses/forward_process.py`). All
of this is done for a batch before its first update, so a run resumes exactly between batches. The first contrast needs
no old prediction: until the first update the policy is the one that generated. A prompt whose images have equal rewards
has the weight 0. Every random number is keyed by the prompt's row.

B prompts, K images of each; C, H, W are a latent's channels, height and width; [KB] are the first images of all
prompts, then the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmalign.config.methods.online_images import (
    AdvantageMethodConfig,
    GenerationConfig,
    ImagesConfig,
    JudgedConfig,
    OnlineConfig,
)
from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.noise import mean_square
from mmalign.families.base import TextToImage
from mmalign.losses.advantages import advantages, informative
from mmalign.methods import Requirements, Step
from mmalign.methods._generated import count_contrasts, parts, summarize_rewards
from mmalign.methods.text_to_image._denoising import CleanPairs, NoisedPairs, noise_clean
from mmalign.methods.text_to_image._images import batch_predictor, judge_images, policy_walk
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG

EQUAL_REWARDS = (
    "the reward model gave all images of each prompt the same score; look at the reward model (method.reward), or "
    "generate more images (method.generation.images)"
)


@dataclass(frozen=True)
class Generated:
    """Generated images of a batch: latents [K, B, C, H, W], rewards [B, K], weights [B], and the step's summary."""

    latents: Tensor
    rewards: Tensor
    weights: Tensor
    summary: Mapping[str, Tensor]


@dataclass(frozen=True)
class Contrast:
    """Noised images of some prompts, before the first update.

    Attributes:
        view: inputs of the networks, and the training target, [KB] rows; the conditioning of the prompts [B].
        old: the prediction [KB, C, H, W] of the policy that generated; None in the first contrast, whose loss makes it,
            unless that policy lags behind.
        reference: the reference's prediction [KB, C, H, W]; None without a reference.
        advantages: [B, K].
        weights: weights of the prompts [B]; 0 if all their rewards are equal.
        summary: the step's, of all prompts of the batch.
    """

    view: NoisedPairs
    old: Tensor | None
    reference: Tensor | None
    advantages: Tensor
    weights: Tensor
    summary: Mapping[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Mean squared errors and differences of predictions [B, K].

    Attributes:
        prediction: the policy's prediction [KB, C, H, W], with gradient.
        old_prediction: that of the policy that generated the images [KB, C, H, W].
        policy: the policy's error.
        old: the error of the policy that generated the images.
        shift: its difference to that policy's prediction.
        reference: the error of the reference; the policy's without one.
        drift: its difference to the reference's prediction; 0 without one.
    """

    prediction: Tensor
    old_prediction: Tensor
    policy: Tensor
    old: Tensor
    shift: Tensor
    reference: Tensor
    drift: Tensor


def requirements(cfg: OnlineConfig) -> Requirements:
    """Return the needs of a method that learns from all images."""
    return judged_requirements(cfg, cfg.generation.noisings, cfg.generation.images)


def judged_requirements(cfg: JudgedConfig, times: int, learned: int, *, rows_per_pair: int = 2) -> Requirements:
    """Return the needs of a method that learns so many times from so many images of each prompt.

    They are prompts alone, a judge, the decoder of images, and a reference if the loss has one.
    """
    return Requirements(
        reference=cfg.uses_reference,
        learns_from="prompts",
        vae_decoder=True,
        contrasts=partial(
            count_contrasts, times, learned, cfg.generation.prompts_per_contrast, rows_per_pair=rows_per_pair
        ),
        reward=cfg.reward,
        combine=cfg.combine,
        judges_groups=True,
        hint_if_empty=EQUAL_REWARDS,
    )


def generate(policy: Policy[TextToImage], batch: EncodedPrompts, cfg: GenerationConfig, rng: KeyedRNG) -> Generated:
    """Generate the images of all prompts and judge them in one call."""
    walk = policy_walk(
        policy, batch, rng, steps=cfg.steps, guidance=cfg.guidance, eta=cfg.eta, batch_size=cfg.batch_size
    )
    x = start_latents(batch, cfg, rng)
    for latents in walk.path(x):
        x = latents
    return judge_latents(policy.family, batch, x)


def start_latents(batch: EncodedPrompts, cfg: ImagesConfig, rng: KeyedRNG, *, shared: bool = False) -> Tensor:
    """Return pure noise [K, B, C, H, W], keyed by row; the same for all images of a prompt if shared."""
    shape = (1 if shared else cfg.images, *batch.shape)
    noise = rng.normal(batch.rows, shape, "start").to(batch.weights.device).transpose(0, 1)
    return noise.expand(cfg.images, *noise.shape[1:])


def judge_latents(family: TextToImage, batch: EncodedPrompts, x: Tensor) -> Generated:
    """Judge the images of latents [K, B, C, H, W] in one call."""
    # [KB] -> [B, K]
    rewards = judge_images(family, batch, x.flatten(0, 1)).view(len(x), -1).T
    summary = summarize_rewards(rewards, batch.weights > 0)
    return Generated(x, rewards, batch.weights * informative(rewards), summary)


def noise_images(family: TextToImage, batch: EncodedPrompts, x_0: Tensor, rng: KeyedRNG, index: int) -> NoisedPairs:
    """Add noise to images [K, B, C, H, W] of the prompts, with one time and one noise per prompt."""
    # One time for all images of a prompt: [B] -> [KB]
    t = family.schedule.draw_time(batch.rows, rng, index).to(x_0.device).repeat(len(x_0))
    clean = CleanPairs(x_0.flatten(0, 1), t, family.condition(batch.text, batch.sizes))
    return noise_clean(family.schedule, clean, batch.rows, rng, index)


def contrasts(
    policy: Policy[TextToImage],
    batch: EncodedPrompts,
    cfg: AdvantageMethodConfig,
    rng: KeyedRNG,
    reference_guidance: float = 1.0,
) -> list[Contrast]:
    """Return contrasts of the generated images of a batch: those of one noising of all prompts after another.

    `reference_guidance` is the guidance scale of the reference's prediction.
    """
    generated, contrasts = generate(policy, batch, cfg.generation, rng), list[Contrast]()
    scale, clip, size = cfg.advantages.scale, cfg.advantages.clip, cfg.generation.batch_size
    # Advantages over the whole batch, before it is cut into parts
    values = advantages(generated.rewards, scale=scale, clip=clip, weights=batch.weights, total=policy.total)
    for index in range(cfg.generation.noisings):
        for part in parts(len(batch.rows), cfg.generation.prompts_per_contrast):
            view = noise_images(policy.family, batch[part], generated.latents[:, part], rng, index)
            # The policy predicts without guidance, as it is trained
            of_policy, of_reference = (
                _predict(policy.family, batch[part], view, guidance, size) for guidance in (1.0, reference_guidance)
            )
            moved = bool(contrasts) or policy.old is not None  # since the policy predicted this
            old: Tensor | None
            if moved and reference_guidance == 1.0:
                old, reference = policy.on_both(of_policy)
            else:
                old, reference = of_policy(policy.unwrapped) if moved else None, policy.on_reference(of_reference)
            contrasts.append(Contrast(view, old, reference, values[part], generated.weights[part], generated.summary))
    return contrasts


def _predict(
    family: TextToImage, batch: EncodedPrompts, view: NoisedPairs, guidance: float, batch_size: int
) -> Callable[[nn.Module], Tensor]:
    """Return a function from a network to its guided predictions [KB, C, H, W]."""
    predict = batch_predictor(family, batch, guidance, batch_size)
    return lambda net: predict(net, view.x_t, view.t)


def errors_of(policy: Policy[TextToImage], contrast: Contrast) -> Errors:
    """Run the policy and return the errors of all predictions."""
    view, number = contrast.view, len(contrast.weights)
    prediction = policy.family.predict(policy.model, view.x_t, view.t, view.cond.cycle(len(view.t))).float()

    def error(a: Tensor, b: Tensor) -> Tensor:
        return by_prompt(mean_square(a, b), number)

    # Until the first update the policy is the old one; a prediction in place of a missing reference has no drift
    old, reference = (prediction.detach() if x is None else x for x in (contrast.old, contrast.reference))
    return Errors(
        prediction,
        old,
        policy=error(prediction, view.target),
        old=error(old, view.target),
        shift=error(prediction, old),
        reference=error(reference, view.target),
        drift=error(prediction, reference),
    )


def by_prompt(values: Tensor, number: int) -> Tensor:
    """Return values [B, K, ...] from [KB, ...], for a number B of prompts."""
    return values.view(-1, number, *values.shape[1:]).transpose(0, 1)


def step(losses: Tensor, errors: Errors, contrast: Contrast) -> Step:
    """Return the step of losses [B], with the change of the errors as metrics.

    "gain" is by how much more the error of better images fell since generation: the mean of advantage times fall.
    """
    with torch.no_grad():
        gain = contrast.advantages * (errors.old - errors.policy)
        own = {"output error": errors.policy, "gain": gain, "shift": errors.shift}
        own |= {"drift": errors.drift} if contrast.reference is not None else {}
        metrics = {"loss": losses.detach(), **{name: values.mean(1).detach() for name, values in own.items()}}
    return Step(losses, contrast.weights, metrics, contrast.summary)
