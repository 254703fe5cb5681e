"""FLUX.2: the states of a Mistral vision-language model, and latents that a batch norm has standardised; flow matching.

Methods see latents of 2 x 2 already taken together, [N, 128, H, W] with a pixel for 16 of the image: that is what the
batch norm's statistics are of, and what the pipeline calls latents. As FLUX.1-dev, the network is told the scale of
guidance; policy and reference are trained at the one at which the pipeline draws if nobody says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading, Moments

GUIDANCE = 4.0
STEPS = 50  # of the pipeline's default, on which its shift depends a little
TOKENS = 512  # of the system's message and the prompt, as the pipeline has it


class Flux2(LatentModel):
    """Adapts a Flux2Pipeline; the protocol TextToImage says what each call does."""

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """The attention's projections of images and of text; a single-stream layer has all of its own in one."""
        return (*flow_matching.JOINT, "to_qkv_mlp_proj")

    def encode_images(self, images: Tensor) -> Moments:
        """See TextToImage."""
        raw = super().encode_images(images)
        mean, std = self._statistics()
        return Moments((F.pixel_unshuffle(raw.mean, 2) - mean) / std, F.pixel_unshuffle(raw.std, 2) / std)

    def decode(self, x: Tensor) -> Tensor:
        """See TextToImage."""
        mean, std = self._statistics()
        return latents.decode(self.pipeline.vae, F.pixel_shuffle(x.float() * std + mean, 2))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel, each [1, C, 1, 1]."""
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, var = (x.float().view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean, (var + eps).sqrt()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` [N, L, D]: three layers' states side by side, of the padding too, as in the pipeline; float32."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=self.pipeline.text_encoder.device)
        return Conditioning({"embeds": embeds.float()})

    def unconditional(self) -> Conditioning:
        """The empty prompt, encoded; the sampler shows the network none."""
        return self.encode_prompts([""])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See TextToImage."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        read = partial(self.pipeline.tokenizer.apply_chat_template, tokenize=True, return_dict=True)
        messages = format_input(list(prompts), self.pipeline.system_message)
        return sum(len(read([one])["input_ids"][0]) > TOKENS for one in messages)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See TextToImage; at the guidance of this file's head."""
        (number, _, height, width), embeds = x_t.shape, cond.tensors["embeds"]
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
        """See LatentModel; the guidance is the number that the network is told."""
        embeds = self.encode_prompts(prompts).tensors["embeds"]
        return {"prompt_embeds": embeds, "guidance_scale": sampling.guidance}

    def latent_shape(self, sampling: SamplingConfig) -> tuple[int, tuple[int, int, int]]:
        """See LatentModel; a latent is one of 2 x 2 of the autoencoder's."""
        side, (channels, height, width) = super().latent_shape(sampling)
        return side, (channels, height // 2, width // 2)

    def unpack(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """Latents of the pipeline's tokens."""
        return _unpack(drawn, height, width)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def load(path: str, loading: Loading) -> Flux2:
    """Load a folder or Hub id with a Flux2Pipeline."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    pipeline = latents.load_pipeline(Flux2Pipeline, path, loading)
    schedule = flow_matching.schedule(pipeline, path)
    if pipeline.scheduler.config.use_dynamic_shifting:
        # This pipeline takes the shift from a fit of its own, and not from the scheduler's fields.
        schedule = replace(
            schedule, shift=math.exp(compute_empirical_mu((pipeline.default_sample_size // 2) ** 2, STEPS))
        )
    return Flux2(path, pipeline, schedule, loading)
