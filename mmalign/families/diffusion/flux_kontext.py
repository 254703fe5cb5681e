"""FLUX.1-Kontext: a FLUX.1 whose network also gets the tokens of a source image, after those of the noisy latents.

Token ids tell both images apart. The source has the size of the edited image. Without a source the model is a FLUX.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmalign.config import ImageSize, SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion.flux import Flux
from mmalign.families.types import Loading


class FluxKontext(Flux):
    """Adapter of a FluxKontextPipeline."""

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """Return FLUX.1's arguments, and the image's area, to which the pipeline would scale it."""
        size = ImageSize.parse(sampling.resolution or self.resolution)
        return {**super().pipeline_kwargs(prompts, sampling), "max_area": size.width * size.height}

    def edit_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig, sources: Tensor) -> dict[str, object]:
        """Return the same, and the sources' latents."""
        return {**self.pipeline_kwargs(prompts, sampling), "image": self.encode_images(sources).mean}


def load(path: str, loading: Loading) -> FluxKontext:
    """Load a folder or Hub id with a FluxKontextPipeline."""
    from diffusers import FluxKontextPipeline

    return flow_matching.load(FluxKontext, FluxKontextPipeline, path, loading)
