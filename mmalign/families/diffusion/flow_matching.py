"""What the flow-matching families share: latents as tokens, text of any length, the layers that are adapted.

Methods see latents [N, C, H, W]; the transformers take a token for every 2 x 2 of them.
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

# The attention's projections of images and of text, as the training scripts of diffusers and Flow-GRPO adapt them.
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def schedule(pipeline: DiffusionPipeline, path: str, resolution: int | None = None) -> Flow:
    """The noise process of a pipeline's scheduler, for images of its own resolution.

    Args:
        pipeline: whose schedule it is.
        path: where it is from, for people.
        resolution: pixels, where the pipeline does not say.

    Raises:
        ValueError: the scheduler is not one of flow matching.
    """
    latent = resolution // pipeline.vae_scale_factor if resolution else pipeline.default_sample_size
    return Flow.from_scheduler(pipeline.scheduler, (latent // 2) ** 2, path)


def pack(latents: Tensor) -> Tensor:
    """Tokens [N, H/2 * W/2, 4C] of latents [N, C, H, W], row by row."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [N, C, height, width] of their tokens."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2), 2)


class PackedModel(LatentModel):
    """A model whose pipeline draws tokens, one for every 2 x 2 of its latents."""

    def latent_shape(self, sampling: SamplingConfig) -> tuple[int, tuple[int, int, int]]:
        """See LatentModel; the network counts the channels of four latents as one's."""
        side, (packed, height, width) = super().latent_shape(sampling)
        return side, (packed // 4, height, width)

    def pack(self, latents: Tensor) -> Tensor:
        """Tokens, as the pipeline takes them."""
        return pack(latents)

    def unpack(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """Latents of the pipeline's tokens."""
        return unpack(drawn, height, width)


def padded(rows: Sequence[Tensor], length: int) -> Conditioning:
    """Embeddings [L, D] of one text each, L at most `length`: `embeds` [N, length, D], and `mask` [N, length].

    The mask is 1 where there is text and 0 where there is none; float32, as everything that is cached comes back.
    """
    embeds = torch.stack([F.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(length, device=embeds.device) < lengths[:, None]
    return Conditioning({"embeds": embeds, "mask": mask.float()})


def texts(cond: Conditioning) -> list[Tensor]:
    """The embeddings [L, D] that `padded` was given."""
    lengths = cond.tensors["mask"].sum(1).int().tolist()
    return [row[:length] for row, length in zip(cond.tensors["embeds"], lengths, strict=True)]
