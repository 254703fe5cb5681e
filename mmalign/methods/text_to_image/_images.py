"""Guided predictions and memory-bounded image decoding, shared by methods that judge partly denoised images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.diffusion.guidance import apply_guidance
from mmalign.families.base import TextToImage
from mmalign.families.types import Conditioning


def predict_guided(
    family: TextToImage,
    net: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    unconditional: Conditioning,
    scale: float,
) -> Tensor:
    """Return the guided prediction [N, C, H, W], float32, from one run on 2N rows (N rows at a scale of 1).

    Args:
        family: the model.
        net: its network.
        x_t: noisy latents [N, C, H, W].
        t: their times [N].
        cond: the full conditioning of each row [N].
        unconditional: the full conditioning without a prompt [N].
        scale: the guidance scale.
    """
    if scale == 1:
        return family.predict(net, x_t, t, cond).float()
    conditioning = Conditioning.cat([unconditional, cond])
    without, with_prompt = family.predict(net, x_t.repeat(2, 1, 1, 1), t.repeat(2), conditioning).chunk(2)
    return apply_guidance(without, with_prompt, scale)


def decode_images(family: TextToImage, latents: Tensor) -> Tensor:
    """Decode latents [N, C, h, w] to images [N, 3, H, W], a few at a time.

    Decoding all large images at once takes more memory than training. A chunk holds one image, or up to eight within
    one megapixel. On a CPU eight small images are a quarter faster than single ones; larger chunks are slower again.
    """
    first = family.decode(latents[:1])
    at_once = min(8, max(1, 2**20 // (first.shape[-2] * first.shape[-1])))
    rest: tuple[Tensor, ...] = torch.split(latents[1:], at_once)
    return torch.cat([first, *(family.decode(some) for some in rest if len(some))])
