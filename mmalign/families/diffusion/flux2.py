"""FLUX.2: states of a Mistral vision-language model, latents standardized by a batch norm; flow matching.

Methods see latents [N, 128, H, W], a 2 x 2 patch of the autoencoder's latents each, with one pixel per 16 of the image.
The pipeline and the batch norm's statistics use the same layout. As in FLUX.1-dev, the guidance scale is an input of
the network; policy and reference are trained at the pipeline's default, `GUIDANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.config import ImageSize, SamplingConfig
from mmalign.families.diffusion import autoencoder, flow_matching
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading, Moments

GUIDANCE = 4.0
TOKENS = 512  # limit of system message and prompt, as in the pipeline


class Flux2(LatentModel):
    """Adapter of a Flux2Pipeline."""

    default_lora_targets = (*flow_matching.JOINT, "to_qkv_mlp_proj")  # the last one is that of single-stream layers

    def encode_images(self, images: Tensor) -> Moments:
        raw = super().encode_images(images)
        mean, std = self._statistics()
        return Moments((F.pixel_unshuffle(raw.mean, 2) - mean) / std, F.pixel_unshuffle(raw.std, 2) / std)

    def decode(self, x: Tensor) -> Tensor:
        mean, std = self._statistics()
        return autoencoder.decode(self.pipeline.vae, F.pixel_shuffle(x.float() * std + mean, 2))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, each [1, C, 1, 1]."""
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, var = (x.float().view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean, (var + eps).sqrt()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return `embeds` [N, L, D], float32: three layers' states, concatenated, with padding as in the pipeline."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=self.pipeline.text_encoder.device)
        return Conditioning({"embeds": embeds.float()})

    def count_truncated(self, prompts: Sequence[str]) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        tokenize = partial(self.pipeline.tokenizer.apply_chat_template, tokenize=True, return_dict=True)
        messages = format_input(list(prompts), self.pipeline.system_message)
        return sum(len(tokenize([message])["input_ids"][0]) > TOKENS for message in messages)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        (number, _, height, width), embeds = x_t.shape, cond.tensors["embeds"]
        # Each pixel of x_t is a token, since it is a patch already
        with self.loading.autocast():
            tokens = net(
                x_t.flatten(2).transpose(1, 2),
                timestep=t,
                guidance=torch.full((number,), GUIDANCE, device=x_t.device),
                encoder_hidden_states=embeds,
                txt_ids=self.pipeline._prepare_text_ids(embeds[:1]).to(x_t.device),
                img_ids=self.pipeline._prepare_latent_ids(x_t[:1]).to(x_t.device),
                return_dict=False,
            )[0]
        return _unpack(tokens, height, width)

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """Return embeddings and the guidance scale, which is an input of the network."""
        embeds = self.encode_prompts(prompts).tensors["embeds"]
        return {"prompt_embeds": embeds, "guidance_scale": sampling.guidance}

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """Return a latent's shape; a latent pixel covers 2 x 2 of the autoencoder's."""
        channels, height, width = super().latent_shape(size)
        return channels, height // 2, width // 2

    def unpack(self, sampled: Tensor, height: int, width: int) -> Tensor:
        """Convert the pipeline's tokens to latents."""
        return _unpack(sampled, height, width)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def load(path: str, loading: Loading) -> Flux2:
    """Load a folder or Hub id with a Flux2Pipeline."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    # This pipeline computes the shift by its own empirical fit, not from the scheduler's fields.
    return flow_matching.load(Flux2, Flux2Pipeline, path, loading, mu=compute_empirical_mu)
