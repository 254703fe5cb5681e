"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5; flow matching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading

TOKENS = 256  # limit of the T5, as in the pipeline


class StableDiffusion3(LatentModel):
    """Adapter of a StableDiffusion3Pipeline."""

    default_lora_targets = flow_matching.JOINT

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return `embeds` [N, L, D] and `pooled` [N, P], float32.

        `embeds` are both CLIPs' states, then the T5's, or zeros without a T5.
        """
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return Conditioning({"embeds": embeds.float(), "pooled": pooled.float()})

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """Count prompts over the limit of the encoder with the highest one."""
        if self.pipeline.tokenizer_3 is None:
            return latents.count_truncated(self.pipeline.tokenizer, prompts)
        return latents.count_truncated(self.pipeline.tokenizer_3, prompts, TOKENS)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds, pooled = cond.tensors["embeds"], cond.tensors["pooled"]
        with self.loading.autocast():
            text = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
            return net(x_t, timestep=1000 * t, return_dict=False, **text)[0]  # type: ignore[no-any-return]

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        return latents.pooled_and_not(self.encode_prompts(prompts), self.unconditional(), sampling)


def load(path: str, loading: Loading) -> StableDiffusion3:
    """Load a folder or Hub id with a StableDiffusion3Pipeline."""
    from diffusers import StableDiffusion3Pipeline

    return flow_matching.load(StableDiffusion3, StableDiffusion3Pipeline, path, loading, even=False)
