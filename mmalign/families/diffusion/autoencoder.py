"""Autoencoders of diffusers: images to latents in the denoiser's scale, and back.

N is the number of images, C a latent's channels, H and W height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.families.types import Moments

if TYPE_CHECKING:
    from diffusers import ModelMixin


@torch.no_grad()
def encode(vae: ModelMixin, images: Tensor) -> Moments:
    """Return the posterior of images [N, 3, H, W] in [-1, 1], in the denoiser's scale."""
    from diffusers.models.autoencoders.vae import EncoderOutput

    with _own_dtype(vae):
        encoded = vae.encode(_as_frames(vae, images.to(vae.device, vae.dtype)))
    scale, shift = _scale_and_shift(vae)
    if isinstance(encoded, EncoderOutput):  # Sana's autoencoder is deterministic
        mean = encoded.latent.float()
        return Moments((mean - shift) * scale, torch.zeros_like(mean))
    mean, std = (_without_frames(x.float()) for x in (encoded.latent_dist.mean, encoded.latent_dist.std))
    return Moments((mean - shift) * scale, std * scale)


@torch.no_grad()
def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Decode latents in the denoiser's scale to images [N, 3, H, W] in [-1, 1], float32."""
    scale, shift = _scale_and_shift(vae)
    with _own_dtype(vae):
        unscaled = (latents.float() / scale + shift).to(vae.device, vae.dtype)
        return _without_frames(vae.decode(_as_frames(vae, unscaled)).sample.float())


def _as_frames(vae: ModelMixin, images: Tensor) -> Tensor:
    """Return [N, C, H, W] unchanged, or as [N, C, 1, H, W] for a video autoencoder."""
    return images.unsqueeze(2) if "temperal_downsample" in vae.config else images


def _without_frames(images: Tensor) -> Tensor:
    """Return [N, C, H, W] unchanged, or the only frame of [N, C, 1, H, W]."""
    return images.squeeze(2) if images.dim() == 5 else images


def _own_dtype(vae: ModelMixin) -> contextlib.AbstractContextManager[object]:
    """Turn autocast off: SDXL's autoencoder overflows in float16."""
    return torch.autocast(vae.device.type, enabled=False)


def _scale_and_shift(vae: ModelMixin) -> tuple[float | Tensor, float | Tensor]:
    """Return s and m of `(latents - m) * s`, numbers or [1, C, 1, 1], which gives the denoiser's scale."""
    config: Mapping[str, Any] = vae.config
    scale: float | Tensor = config.get("scaling_factor", 1.0)
    shift: float | Tensor = config.get("shift_factor") or 0.0
    # Some autoencoders have a mean and a deviation for each channel
    if config.get("latents_std") is not None:
        std, mean = (torch.tensor(config[name], device=vae.device) for name in ("latents_std", "latents_mean"))
        scale, shift = scale / std.view(1, -1, 1, 1), mean.view(1, -1, 1, 1)
    return scale, shift
