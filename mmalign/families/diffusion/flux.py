"""FLUX.1: a pooled CLIP, a T5, and a transformer over packed latents that is told the scale of guidance; flow matching.

FLUX.1-dev was distilled from guided predictions: the scale is one more number that the network is given, and there is
no second run without the prompt. Policy and reference are trained at the scale at which the pipeline draws if nobody
says otherwise. FLUX.1-schnell is not told any, and draws alike whatever it is.
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
TOKENS = 512  # that the T5 reads, as the pipeline has it


class Flux(flow_matching.PackedModel):
    """Adapts a FluxPipeline; the protocol TextToImage says what each call does."""

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """The attention's projections of images and of text."""
        return flow_matching.JOINT

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` [N, L, D]: the T5's last states; `pooled` [N, P]: the CLIP's; float32."""
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.pipeline.text_encoder.device)
        return Conditioning({"embeds": embeds.float(), "pooled": pooled.float()})

    def unconditional(self) -> Conditioning:
        """The empty prompt, encoded; the sampler shows the network none."""
        return self.encode_prompts([""])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the T5 reads; the CLIP reads less, and gives no more than a summary."""
        return latents.count_truncated(self.pipeline.tokenizer_2, prompts, TOKENS)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See TextToImage; at the guidance of this file's head."""
        (number, _, height, width), embeds = x_t.shape, cond.tensors["embeds"]
        takes_guidance = self.pipeline.transformer.config.guidance_embeds
        with self.loading.autocast():
            tokens = net(
                flow_matching.pack(x_t),
                timestep=t,
                guidance=torch.full((number,), GUIDANCE, device=x_t.device) if takes_guidance else None,
                encoder_hidden_states=embeds,
                pooled_projections=cond.tensors["pooled"],
                txt_ids=embeds.new_zeros(embeds.shape[1], 3),
                img_ids=self.pipeline._prepare_latent_image_ids(
                    number, height // 2, width // 2, x_t.device, embeds.dtype
                ),
                return_dict=False,
            )[0]
        return flow_matching.unpack(tokens, height, width)

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """See LatentModel; the guidance is the number that the network is told."""
        cond = self.encode_prompts(prompts).tensors
        text = {"prompt_embeds": cond["embeds"], "pooled_prompt_embeds": cond["pooled"]}
        return {**text, "guidance_scale": sampling.guidance}


def load(path: str, loading: Loading) -> Flux:
    """Load a folder or Hub id with a FluxPipeline."""
    from diffusers import FluxPipeline

    pipeline = latents.load_pipeline(FluxPipeline, path, loading)
    return Flux(path, pipeline, flow_matching.schedule(pipeline, path), loading)
