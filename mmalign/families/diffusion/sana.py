"""Sana: states of a Gemma 2 with an instruction to enhance the prompt, a deterministic autoencoder; flow matching.

A latent has one pixel per 32 of the image, and its posterior has no variance. Text has a fixed length with a mask, as
in the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading

TOKENS = 300  # limit of the prompt, as in the pipeline


class Sana(LatentModel):
    """Adapter of a SanaPipeline."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return last hidden states, `embeds` [N, L, D], and `mask` [N, L], 1 for text; float32."""
        return self._encode(prompts, self._instruction())

    def unconditional(self) -> Conditioning:
        """Encode the empty prompt without the instruction."""
        return self._encode([""], None)

    def _instruction(self) -> list[str]:
        """Return the pipeline's default instruction, which precedes the prompt."""
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return list(parameters["complex_human_instruction"].default)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            complex_human_instruction=instruction,
        )
        return Conditioning({"embeds": embeds.float(), "mask": mask.float()})

    def count_truncated(self, prompts: Sequence[str]) -> int:
        tokenizer, instruction = self.pipeline.tokenizer, "\n".join(self._instruction())
        limit = len(tokenizer.encode(instruction)) + TOKENS - 2  # as the pipeline computes it
        whole = [instruction + prompt.lower().strip() for prompt in prompts]
        return latents.count_truncated(tokenizer, whole, limit)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        config = self.pipeline.transformer.config
        text = {"encoder_hidden_states": cond.tensors["embeds"], "encoder_attention_mask": cond.tensors["mask"]}
        with self.loading.autocast():
            return net(x_t, timestep=1000 * config.timestep_scale * t, return_dict=False, **text)[0]  # type: ignore[no-any-return]

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        cond = self.encode_prompts(prompts).tensors
        empty = self.unconditional().expand(len(prompts)).tensors
        text: dict[str, object] = {"prompt_embeds": cond["embeds"], "prompt_attention_mask": cond["mask"]}
        text |= {"negative_prompt_embeds": empty["embeds"], "negative_prompt_attention_mask": empty["mask"]}
        # No binning: images have exactly the requested size.
        return text | {"negative_prompt": None, "guidance_scale": sampling.guidance, "use_resolution_binning": False}


def load(path: str, loading: Loading) -> Sana:
    """Load a folder or Hub id with a SanaPipeline."""
    from diffusers import SanaPipeline

    return flow_matching.load(Sana, SanaPipeline, path, loading, even=False)
