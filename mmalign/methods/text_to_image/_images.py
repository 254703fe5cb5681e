"""What methods share that look at images on the way from noise: guided predictions, and the pictures in latents."""

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
    """The guided prediction [N, C, H, W], float32, by one run of the network on 2N rows; on N for a scale of 1.

    Args:
        family: the model.
        net: its network.
        x_t: noisy latents [N, C, H, W].
        t: their times [N].
        cond: the whole conditioning of each [N].
        unconditional: the whole conditioning without a prompt [N].
        scale: of the guidance.
    """
    if scale == 1:
        return family.predict(net, x_t, t, cond).float()
    conditioning = Conditioning.cat([unconditional, cond])
    without, with_prompt = family.predict(net, x_t.repeat(2, 1, 1, 1), t.repeat(2), conditioning).chunk(2)
    return apply_guidance(without, with_prompt, scale)


def decode_images(family: TextToImage, latents: Tensor) -> Tensor:
    """Images [N, 3, H, W] of latents [N, C, h, w], decoded some at a time.

    All at once, large ones take more memory than the training. As many as have a megapixel together, and eight at most:
    on a CPU eight small ones are a quarter faster than one by one, and more are slower again.
    """
    first = family.decode(latents[:1])
    at_once = min(8, max(1, 2**20 // (first.shape[-2] * first.shape[-1])))
    rest: tuple[Tensor, ...] = torch.split(latents[1:], at_once)
    return torch.cat([first, *(family.decode(some) for some in rest if len(some))])
