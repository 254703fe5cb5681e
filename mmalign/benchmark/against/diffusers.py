"""The step of diffusers' Diffusion-DPO scripts (examples/research_projects/diffusion_dpo), Stable Diffusion and SDXL.

    x_0 = autoencoder(pixels).sample()                                  every step, eight images at a time
    text = text encoder(prompts)                                        every step, once a pair
    x_t = add_noise(x_0, eps, t)                                        eps and t of a pair are one
    policy's errors, then with the adapters off the reference's         2B rows each, means of squares
    loss = -log sigma(beta / 2 * (reference's difference - policy's))   difference: chosen - rejected

The scripts' arithmetic on diffusers' scheduler, with the reference that our run has: they train adapters alone, so for
a full fine-tuning it is a frozen copy, as in the official program. The optimizer is AdamW as torch has it by default.
Draws are those of our run; captions are not dropped, since empty ones are encoded otherwise. In half precision the
script of Stable Diffusion puts the autoencoder into it, too, and that of SDXL does not: so do both sides here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmalign.benchmark.runs import Run
from mmalign.config import Recipe, Train
from mmalign.families import loading
from mmalign.families.types import Conditioning
from mmalign.policy import Policy
from mmalign.resources import resolve_model
from mmalign.rng import Draws

about = "diffusers' script: autoencoder, text encoder, policy and reference in every step"
own = ("data.cache='off'", "train.attention='sdpa'", "train.compile=false")

HALF_VAE = "StableDiffusionPipeline"
PIPELINES = (HALF_VAE, "StableDiffusionXLPipeline")
ENCODED = 8  # images that the scripts' autoencoder takes at a time


def available() -> None:
    """Diffusers is always there."""


def check(recipe: Recipe, processes: int) -> None:
    """Refuse methods and models that the scripts do not train.

    Raises:
        ValueError: which.
    """
    method: Any = recipe.method
    if method.name != "diffusion_dpo" or method.loss != "dpo" or method.label_smoothing:
        raise ValueError(
            "--against diffusers: its scripts do Diffusion-DPO with the paper's loss; expected method: {name: "
            f"diffusion_dpo}} with loss: dpo and label_smoothing: 0, got {_said(method)}"
        )
    cls = _pipeline(recipe)
    if cls not in PIPELINES:
        raise ValueError(
            f"--against diffusers: its scripts train Stable Diffusion and SDXL, and model.path is a {cls}; use a "
            "recipe of one of these"
        )


def alike(recipe: Recipe) -> Sequence[str]:
    """See Peer."""
    precision = recipe.train.precision
    half = precision != "float32" and _pipeline(recipe) == HALF_VAE
    return ("method.caption_dropout=0.0", *([f"model.vae_dtype={precision}"] if half else []))


def _pipeline(recipe: Recipe) -> str:
    return loading.pipeline_class(resolve_model(recipe.model.path), recipe.model.revision)


def _said(method: Any) -> str:
    return ", ".join(
        f"{key}: {getattr(method, key)}" for key in ("name", "loss", "label_smoothing") if hasattr(method, key)
    )


def prepare(policy: Policy) -> None:
    """Nothing."""


def optimizer(parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
    """Torch's AdamW with its own defaults; the recipe's where that asks for another."""
    if options.optimizer != "adamw":
        return None
    betas = (options.betas[0], options.betas[1])
    return torch.optim.AdamW(parameters, lr=options.lr, betas=betas, weight_decay=options.weight_decay)


def loss(run: Run, batch: Any, draws: Draws, switch: Callable[[str], None]) -> Tensor:
    """See Peer."""
    family, policy = run.policy.family, run.policy
    scheduler, network = _scheduler(family.pipeline), policy.model
    x_0 = _encode(family.pipeline.vae, batch.pixels, draws, batch.rows, run.device)
    with torch.no_grad():
        text = family.encode_prompts(batch.prompts).to(run.device)
    switch("noise")
    one, number = (x_0.shape[1:], len(batch.rows))
    eps = draws.normal(batch.rows, tuple(one), "noise").to(run.device).repeat(2, 1, 1, 1)
    t = draws.integers(batch.rows, 0, scheduler.config.num_train_timesteps, "time").to(run.device).repeat(2)
    x_t = scheduler.add_noise(x_0, eps, t)
    is_eps = scheduler.config.prediction_type == "epsilon"
    target = eps if is_eps else scheduler.get_velocity(x_0, eps, t)
    cond: Conditioning = family.condition(text.repeat(2), batch.sizes.to(run.device))

    def difference(net: nn.Module) -> Tensor:
        answer = family.predict(net, x_t, t, cond)
        errors = functional.mse_loss(answer.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        return errors[:number] - errors[number:]

    switch("policy")
    ours = difference(network)
    switch("reference")
    theirs = policy.on_reference(difference)
    switch("policy")
    assert theirs is not None, "diffusion_dpo has a reference"
    method: Any = run.recipe.method
    result = -functional.logsigmoid(0.5 * method.beta * (theirs - ours)).mean()
    result.detach().item()  # the scripts log every step's loss
    return result


@torch.no_grad()
def _encode(vae: Any, pixels: Tensor, draws: Draws, rows: Sequence[int], device: torch.device) -> Tensor:
    """Samples of the posteriors of images [2B, 3, R, R], scaled."""
    some = (pixels[first : first + ENCODED] for first in range(0, len(pixels), ENCODED))
    parts = [vae.encode(images.to(device, vae.dtype)).latent_dist for images in some]
    mean, std = torch.cat([p.mean for p in parts]).float(), torch.cat([p.std for p in parts]).float()
    noise = draws.normal(rows, (2, *mean.shape[1:]), "posterior").to(device).transpose(0, 1).flatten(0, 1)
    scaled: Tensor = (mean + std * noise) * vae.config.scaling_factor
    return scaled


def _scheduler(pipeline: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipeline.scheduler.config)
