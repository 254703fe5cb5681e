"""Images that the policy generates: its sampler, guided predictions, memory-bounded decoding, and their judge.

B prompts and k latents of each; C, H, W are a latent's channels, height and width; S is the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmalign.data.loaders.batches import EncodedPrompts
from mmalign.diffusion.guidance import apply_guidance
from mmalign.diffusion.walk import Walk
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.types import Conditioning
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG


@dataclass(frozen=True)
class Guided:
    """Conditioning of predictions under guidance.

    Attributes:
        scale: the guidance scale.
        cond: the full conditioning [N].
        unconditional: the full conditioning without a prompt [N]; None at a scale of 1.
    """

    scale: float
    cond: Conditioning
    unconditional: Conditioning | None

    def __getitem__(self, rows: Tensor) -> Guided:
        unconditional = None if self.unconditional is None else self.unconditional[rows]
        return Guided(self.scale, self.cond[rows], unconditional)


def guided(family: TextToImage, batch: EncodedPrompts, scale: float) -> Guided:
    """Return the conditioning [B] of the prompts of a batch."""
    unconditional = None if scale == 1 else family.condition(batch.unconditional, batch.sizes)
    return Guided(scale, family.condition(batch.text, batch.sizes), unconditional)


def predict_guided(family: TextToImage, net: nn.Module, x_t: Tensor, t: Tensor, text: Guided) -> Tensor:
    """Return the guided prediction [N, C, H, W], float32, from one run on 2N rows (N rows at a scale of 1).

    Args:
        family: the model.
        net: its network.
        x_t: noisy latents [N, C, H, W].
        t: their times [N].
        text: the conditioning of each row [N].
    """
    if text.unconditional is None:
        return family.predict(net, x_t, t, text.cond).float()
    # Both predictions in one pass: without the prompt, then with it
    conditioning = Conditioning.cat([text.unconditional, text.cond])
    without, with_prompt = family.predict(net, x_t.repeat(2, 1, 1, 1), t.repeat(2), conditioning).chunk(2)
    return apply_guidance(without, with_prompt, text.scale)


def decode_images(family: TextToImage, latents: Tensor) -> Tensor:
    """Decode latents [N, C, h, w] to images [N, 3, H, W], a few at a time.

    Decoding all large images at once takes more memory than training. A chunk holds one image, or up to eight within
    one megapixel. On a CPU eight small images are a quarter faster than single ones; larger chunks are slower again.
    """
    # The first image tells the size of all
    first = family.decode(latents[:1])
    at_once = min(8, max(1, 2**20 // (first.shape[-2] * first.shape[-1])))
    rest: tuple[Tensor, ...] = torch.split(latents[1:], at_once)
    return torch.cat([first, *(family.decode(some) for some in rest if len(some))])


def policy_walk(
    policy: Policy[TextToImage],
    batch: EncodedPrompts,
    rng: KeyedRNG,
    *,
    steps: int,
    guidance: float,
    eta: float | None,
    stochastic: Tensor | None = None,
    batch_size: int | None = None,
) -> Walk:
    """Return the policy's sampler for the prompts of a batch, with noise keyed by row.

    Args:
        policy: the policy.
        batch: the prompts [B].
        rng: the epoch's random numbers.
        steps: S.
        guidance: the guidance scale.
        eta: the noise of a stochastic step; 0 for none.
        stochastic: mask [S, B] of stochastic steps; None for all.
        batch_size: latents that go through the network at once; None for all.
    """
    family, device = policy.family, batch.weights.device
    predict = batch_predictor(family, batch, guidance, batch_size)

    # Noise [k, B, C, H, W] of a step
    def noise(k: int, index: int) -> Tensor:
        return rng.normal(batch.rows, (k, *batch.shape), "step", index).to(device).transpose(0, 1)

    return Walk(
        family.schedule,
        family.schedule.times(steps).to(device),
        partial(predict, policy.unwrapped),
        noise,
        eta,
        stochastic,
    )


def batch_predictor(
    family: TextToImage, batch: EncodedPrompts, guidance: float, batch_size: int | None
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return a function from a network, latents [kB, C, H, W] and times [kB] to guided predictions [kB, C, H, W].

    The latents are k for each prompt of the batch; `batch_size` of them go through the network at once, None for all.
    """
    number, text = len(batch.rows), guided(family, batch, guidance)

    def predict(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        # Latent i belongs to prompt i mod B
        parts: tuple[Tensor, ...] = torch.split(torch.arange(len(x), device=x.device), batch_size or len(x))
        return torch.cat([predict_guided(family, net, x[rows], t[rows], text[rows % number]) for rows in parts])

    return predict


def judge_images(family: TextToImage, batch: EncodedPrompts, latents: Tensor, t: Tensor | None = None) -> Tensor:
    """Return the reward model's scores [kB] of clean latents [kB, C, H, W], k for each prompt of the batch.

    `t` are DDPM's timesteps [kB] at which the latents were predicted, for a reward model that reads them.
    """
    assert batch.reward_model is not None, "the method needs a reward model"
    images = to_pil(decode_images(family, latents))
    return batch.reward_model(images, list(batch.prompts) * (len(latents) // len(batch.rows)), t).to(latents.device)
