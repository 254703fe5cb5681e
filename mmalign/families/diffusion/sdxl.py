"""Stable Diffusion XL: two text encoders, a pooled embedding, micro-conditioning on image sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.diffusion.noise import Diffusion
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading


class StableDiffusionXL(LatentModel):
    """Adapter of a StableDiffusionXLPipeline."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return both encoders' penultimate states `embeds` [N, L, D1 + D2], the second's `pooled` [N, P]; float32."""
        device = self.pipeline.text_encoder_2.device
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        return Conditioning({"embeds": embeds.float(), "pooled": pooled.float()})

    def unconditional(self) -> Conditioning:
        """Return zeros if the pipeline samples with zeros, as SDXL base does; else encode the empty prompt.

        The Diffusion-DPO release encodes "" here, although the sampler never gives that to the network.
        """
        empty = self.encode_prompts([""])
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return Conditioning({name: torch.zeros_like(x) for name, x in empty.tensors.items()})
        return empty

    def condition(self, text: Conditioning, sizes: Tensor) -> Conditioning:
        """Add `time_ids` [N, 6]: original size, crop corner and target size of each row's image."""
        return Conditioning({**text.tensors, "time_ids": sizes.to(text.tensors["embeds"])})

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        added = {"text_embeds": cond.tensors["pooled"], "time_ids": cond.tensors["time_ids"]}
        with self.loading.autocast():
            embeds = cond.tensors["embeds"]
            return net(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]  # type: ignore[no-any-return]

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        return latents.pooled_and_not(self.encode_prompts(prompts), self.unconditional(), sampling)


def load(path: str, loading: Loading) -> StableDiffusionXL:
    """Load a folder or Hub id with a StableDiffusionXLPipeline."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = latents.load_pipeline(StableDiffusionXLPipeline, path, loading)
    return StableDiffusionXL(path, pipeline, Diffusion.from_config(pipeline.scheduler.config, path), loading)
