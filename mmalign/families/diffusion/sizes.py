"""Image sizes of a diffusers pipeline, from its autoencoder and its denoiser."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from mmalign.config import ImageSize

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def denoiser_name(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> str:
    """Return the name of a pipeline's denoiser: "transformer" or "unet"."""
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    return "transformer" if "transformer" in inspect.signature(cls).parameters else "unet"


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """Return the number of pixels that a side is a multiple of: a patch of the autoencoder and the denoiser."""
    patches = pipeline.vae_scale_factor * getattr(pipeline, "patch_size", 1)
    return int(max(patches, pipeline.image_processor.config.vae_scale_factor))


def check_size(pipeline: DiffusionPipeline, size: ImageSize) -> None:
    """Check that an image's sides are multiples of the pipeline's patches, and within its table of positions.

    Raises:
        ValueError: a side is not a multiple, or too long.
    """
    multiple = size_multiple(pipeline)
    if any(side % multiple for side in size):
        raise ValueError(
            f"resolution: got {size}; expected multiples of {multiple} pixels for a {type(pipeline).__name__}; "
            "change data.resolution or sampling.resolution"
        )
    # Patches of the table of positions, as pixels; without a table every side fits
    config = getattr(pipeline, denoiser_name(pipeline)).config
    longest = config.get("pos_embed_max_size", max(size)) * config.get("patch_size", 1) * pipeline.vae_scale_factor
    if max(size) > longest:
        raise ValueError(
            f"resolution: got {size}; {type(pipeline).__name__} has positions for sides of at most {longest} pixels; "
            "change data.resolution or sampling.resolution"
        )


def resolution(pipeline: DiffusionPipeline) -> int:
    """Return the side of a pipeline's images in pixels: the latent side times the autoencoder's reduction."""
    latent_side = getattr(pipeline, "default_sample_size", None)  # for denoisers without a configured size
    latent_side = latent_side or getattr(pipeline, denoiser_name(pipeline)).config.sample_size
    return int(latent_side * pipeline.vae_scale_factor)
