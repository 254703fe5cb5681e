"""FLUX.1: pooled CLIP and T5 embeddings, packed latents, guidance scale as a network input; flow matching.

FLUX.1-dev is distilled from guided predictions. The guidance scale is an input of the network, and sampling needs no
second pass without the prompt. Policy and reference are trained at the pipeline's default scale, `GUIDANCE`.
FLUX.1-schnell has no such input, and ignores the scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.types import Conditioning, Loading

GUIDANCE = 3.5
TOKENS = 512  # limit of the T5, as in the pipeline


class Flux(flow_matching.PackedModel):
    """Adapter of a FluxPipeline."""

    default_lora_targets = flow_matching.JOINT

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the T5's last states, `embeds` [N, L, D], and the CLIP's pooled state, `pooled` [N, P]; float32."""
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.pipeline.text_encoder.device)
        return Conditioning({"embeds": embeds.float(), "pooled": pooled.float()})

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """Count prompts over the T5's limit; the CLIP's limit is lower, but it adds only a pooled embedding."""
        return latents.count_truncated(self.pipeline.tokenizer_2, prompts, TOKENS)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        (number, _, height, width), embeds = x_t.shape, cond.tensors["embeds"]
        takes_guidance = self.pipeline.transformer.config.guidance_embeds
        # Tokens of x_t, then of the source image if there is one
        images = flow_matching.images(x_t, cond)
        with self.loading.autocast():
            tokens = net(
                torch.cat([flow_matching.pack(image) for image in images], 1),
                timestep=t,
                guidance=torch.full((number,), GUIDANCE, device=x_t.device) if takes_guidance else None,
                encoder_hidden_states=embeds,
                pooled_projections=cond.tensors["pooled"],
                txt_ids=embeds.new_zeros(embeds.shape[1], 3),
                img_ids=torch.cat([self._ids(image, place) for place, image in enumerate(images)]).to(embeds.dtype),
                return_dict=False,
            )[0]
        # The answer at the tokens of x_t, one for each 2 x 2 patch
        return flow_matching.unpack(tokens[:, : height * width // 4], height, width)

    def _ids(self, image: Tensor, place: int) -> Tensor:
        """Return the ids of an image's tokens [L, 3]: the image's place in the sequence, row and column."""
        number, _, height, width = image.shape
        ids: Tensor = self.pipeline._prepare_latent_image_ids(
            number, height // 2, width // 2, image.device, torch.float32
        )
        ids[:, 0] = place
        return ids

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """Return embeddings and the guidance scale, which is an input of the network."""
        cond = self.encode_prompts(prompts).tensors
        text = {"prompt_embeds": cond["embeds"], "pooled_prompt_embeds": cond["pooled"]}
        return {**text, "guidance_scale": sampling.guidance}


def load(path: str, loading: Loading) -> Flux:
    """Load a folder or Hub id with a FluxPipeline."""
    from diffusers import FluxPipeline

    return flow_matching.load(Flux, FluxPipeline, path, loading)
