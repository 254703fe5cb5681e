"""Step of diffusers' Diffusion-DPO scripts (examples/research_projects/diffusion_dpo) for Stable Diffusion and SDXL.

    x_0 = autoencoder(pixels).sample()                                  every step, eight images at a time
    text = text encoder(prompts)                                        every step, once a pair
    x_t = add_noise(x_0, eps, t)                                        one eps and t per pair
    policy's errors, then with the adapters off the reference's         2B rows each, means of squares
    loss = -log sigma(beta / 2 * (reference's difference - policy's))   difference: chosen - rejected

The scripts' arithmetic runs on diffusers' scheduler, with the reference and the random numbers of our run. The scripts
train adapters alone. For full fine-tuning the reference is a frozen copy, as in the official program. The optimizer is
torch's default AdamW. Captions are not dropped, since the scripts encode empty ones differently.

In half precision, the script of Stable Diffusion has a half-precision autoencoder, and that of SDXL has not. Both sides
of the comparison do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmalign.commands._bench_run import Run
from mmalign.config import Recipe, Train
from mmalign.config.losses import DPOLossConfig
from mmalign.families import loading
from mmalign.families.types import Conditioning
from mmalign.policy import Policy
from mmalign.resources import resolve_model
from mmalign.rng import KeyedRNG

about = "the script of diffusers: autoencoder, text encoder, policy and reference run in every step"
own = ("data.cache='off'", "train.attention='sdpa'", "train.compile=false")

HALF_VAE = "StableDiffusionPipeline"
PIPELINES = (HALF_VAE, "StableDiffusionXLPipeline")
ENCODED = 8  # images per call of the scripts' autoencoder


def available() -> None:
    """Do nothing: diffusers is a dependency."""


def check(recipe: Recipe, num_processes: int) -> None:
    """Refuse methods and models that the scripts do not train."""
    method: Any = recipe.method
    if method.name != "diffusion_dpo" or method.loss != DPOLossConfig():
        raise ValueError(
            f"diffusers: got method.name: {method.name} and its settings; expected method: {{name: diffusion_dpo}} "
            "with loss: dpo, as in its scripts"
        )
    cls = _pipeline(recipe)
    if cls not in PIPELINES:
        raise ValueError(f"diffusers: got model.path of a {cls}; expected {' or '.join(PIPELINES)}, as in its scripts")


def alike(recipe: Recipe) -> Sequence[str]:
    """Return the settings of the scripts' captions and autoencoder."""
    precision = recipe.train.precision
    half = precision != "float32" and _pipeline(recipe) == HALF_VAE
    return ("method.caption_dropout=0.0", *([f"model.vae_dtype={precision}"] if half else []))


def _pipeline(recipe: Recipe) -> str:
    return loading.pipeline_class(resolve_model(recipe.model.path), recipe.model.revision)


def prepare(policy: Policy) -> None:
    """Do nothing."""


def optimizer(parameters: Sequence[nn.Parameter], options: Train) -> torch.optim.Optimizer | None:
    """Return AdamW with torch's defaults, or None if the recipe has another optimizer."""
    if options.optimizer != "adamw":
        return None
    betas = (options.betas[0], options.betas[1])
    return torch.optim.AdamW(parameters, lr=options.lr, betas=betas, weight_decay=options.weight_decay)


def loss(run: Run, batch: Any, rng: KeyedRNG, switch: Callable[[str], None]) -> Tensor:
    """Return the mean loss of a batch."""
    family, policy, scheduler = run.policy.family, run.policy, _scheduler(run.policy.family.pipeline)
    x_0 = _encode(family.pipeline.vae, batch.pixels, rng, batch.rows, run.device)
    with torch.no_grad():
        text = family.encode_prompts(batch.prompts).to(run.device)
    # One noise and one time for both images of a pair
    switch("noise")
    num_pairs = len(batch.rows)
    eps = rng.normal(batch.rows, tuple(x_0.shape[1:]), "noise").to(run.device).repeat(2, 1, 1, 1)
    t = rng.integers(batch.rows, 0, scheduler.config.num_train_timesteps, "time").to(run.device).repeat(2)
    x_t = scheduler.add_noise(x_0, eps, t)
    target = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x_0, eps, t)
    condition: Conditioning = family.condition(text.repeat(2), batch.sizes.to(run.device))

    def difference(net: nn.Module) -> Tensor:
        prediction = family.predict(net, x_t, t, condition)
        errors = functional.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        return errors[:num_pairs] - errors[num_pairs:]

    switch("policy")
    policy_difference = difference(policy.model)
    switch("reference")
    reference_difference = policy.on_reference(difference)
    switch("policy")
    assert reference_difference is not None, "diffusion_dpo has a reference"
    method: Any = run.recipe.method
    result = -functional.logsigmoid(0.5 * method.beta * (reference_difference - policy_difference)).mean()
    result.detach().item()  # the scripts log every step's loss
    return result


@torch.no_grad()
def _encode(vae: Any, pixels: Tensor, rng: KeyedRNG, rows: Sequence[int], device: torch.device) -> Tensor:
    """Sample the posteriors of images [2B, 3, R, R], and scale the latents."""
    parts = [vae.encode(images.to(device, vae.dtype)).latent_dist for images in pixels.split(ENCODED)]
    mean, std = torch.cat([p.mean for p in parts]).float(), torch.cat([p.std for p in parts]).float()
    noise = rng.normal(rows, (2, *mean.shape[1:]), "posterior").to(device).transpose(0, 1).flatten(0, 1)
    scaled: Tensor = (mean + std * noise) * vae.config.scaling_factor
    return scaled


def _scheduler(pipeline: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipeline.scheduler.config)
