"""Stable Diffusion 1.x and 2.x (and models/tiny_sd): one text encoder, epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.diffusion.noise import Diffusion
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading


class StableDiffusion(LatentModel):
    """Adapter of a StableDiffusionPipeline."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text encoder's last hidden states, `embeds` [N, L, D], float32."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.pipeline.text_encoder.device, 1, False)
        return Conditioning({"embeds": embeds.float()})

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with self.loading.autocast():
            return net(x_t, t, encoder_hidden_states=cond.tensors["embeds"], return_dict=False)[0]  # type: ignore[no-any-return]

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        embeds = self.encode_prompts(prompts).tensors["embeds"]
        empty = self.unconditional().expand(len(prompts)).tensors["embeds"]
        return {"prompt_embeds": embeds, "negative_prompt_embeds": empty, "guidance_scale": sampling.guidance}


def load(path: str, loading: Loading) -> StableDiffusion:
    """Load a folder or Hub id with a StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = latents.load_pipeline(StableDiffusionPipeline, path, loading)
    return StableDiffusion(path, pipeline, Diffusion.from_config(pipeline.scheduler.config, path), loading)
