"""Shared code of flow-matching families: packed latents, padded text, default LoRA targets.

Methods see latents [N, C, H, W]; the transformers take one token per 2 x 2 patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.config import SamplingConfig
from mmalign.diffusion.flow import Flow
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.lora import ATTENTION
from mmalign.families.types import Conditioning

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Attention projections of images and text, as in the LoRA scripts of diffusers and Flow-GRPO.
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def schedule(pipeline: DiffusionPipeline, path: str, resolution: int | None = None) -> Flow:
    """Return the noise process of a pipeline's scheduler, at the pipeline's default resolution.

    Args:
        pipeline: the pipeline.
        path: its name in error messages.
        resolution: pixels, if the pipeline does not state it.

    Raises:
        ValueError: the scheduler is not a flow-matching one.
    """
    latent = resolution // pipeline.vae_scale_factor if resolution else pipeline.default_sample_size
    return Flow.from_scheduler(pipeline.scheduler, (latent // 2) ** 2, path)


def pack(latents: Tensor) -> Tensor:
    """Convert latents [N, C, H, W] to tokens [N, H/2 * W/2, 4C], row by row."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Convert tokens back to latents [N, C, height, width]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2), 2)


class PackedModel(LatentModel):
    """A model whose pipeline samples tokens, one per 2 x 2 patch of its latents."""

    def latent_shape(self, sampling: SamplingConfig) -> tuple[int, tuple[int, int, int]]:
        """Return image side and latent shape; the network's channels are those of a 2 x 2 patch."""
        side, (packed, height, width) = super().latent_shape(sampling)
        return side, (packed // 4, height, width)

    def pack(self, latents: Tensor) -> Tensor:
        """Convert latents to the pipeline's tokens."""
        return pack(latents)

    def unpack(self, sampled: Tensor, height: int, width: int) -> Tensor:
        """Convert the pipeline's tokens to latents."""
        return unpack(sampled, height, width)


def padded(rows: Sequence[Tensor], length: int) -> Conditioning:
    """Pad the embeddings [L, D] of texts, L <= `length`, to `embeds` [N, length, D] with `mask` [N, length].

    The mask is 1 for text and 0 for padding; float32, as caches return all tensors.
    """
    embeds = torch.stack([F.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(length, device=embeds.device) < lengths[:, None]
    return Conditioning({"embeds": embeds, "mask": mask.float()})


def texts(cond: Conditioning) -> list[Tensor]:
    """Return the unpadded embeddings [L, D], the inverse of `padded`."""
    lengths = cond.tensors["mask"].sum(1).int().tolist()
    return [row[:length] for row, length in zip(cond.tensors["embeds"], lengths, strict=True)]
