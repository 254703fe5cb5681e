"""Sana: the states of a Gemma 2 that is told to enhance the prompt, an autoencoder without a posterior; flow matching.

Its latents have a pixel for 32 of the image, and no spread. Text is of fixed length with a mask, as in the pipeline.
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

TOKENS = 300  # of the prompt, as the pipeline has it


class Sana(LatentModel):
    """Adapts a SanaPipeline; the protocol TextToImage says what each call does."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` [N, L, D]: the last states; `mask` [N, L]: 1 where there is text; float32."""
        return self._encode(prompts, self._instruction())

    def unconditional(self) -> Conditioning:
        """The empty prompt, encoded without the instruction to enhance it."""
        return self._encode([""], None)

    def _instruction(self) -> list[str]:
        """What the pipeline puts before prompts if it is told nothing else."""
        called = inspect.signature(type(self.pipeline).__call__).parameters
        return list(called["complex_human_instruction"].default)

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
        """See TextToImage."""
        tokenizer, instruction = self.pipeline.tokenizer, "\n".join(self._instruction())
        limit = len(tokenizer.encode(instruction)) + TOKENS - 2  # the pipeline's own reckoning
        whole = [instruction + prompt.lower().strip() for prompt in prompts]
        return latents.count_truncated(tokenizer, whole, limit)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See TextToImage."""
        config = self.pipeline.transformer.config
        text = {"encoder_hidden_states": cond.tensors["embeds"], "encoder_attention_mask": cond.tensors["mask"]}
        with self.loading.autocast():
            return net(x_t, timestep=1000 * config.timestep_scale * t, return_dict=False, **text)[0]  # type: ignore[no-any-return]

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """See LatentModel."""
        cond = self.encode_prompts(prompts).tensors
        empty = latents.repeat_rows(self.unconditional(), len(prompts)).tensors
        text: dict[str, object] = {"prompt_embeds": cond["embeds"], "prompt_attention_mask": cond["mask"]}
        text |= {"negative_prompt_embeds": empty["embeds"], "negative_prompt_attention_mask": empty["mask"]}
        # Without its own list of sizes, so that an image has the size asked for.
        return text | {"negative_prompt": None, "guidance_scale": sampling.guidance, "use_resolution_binning": False}


def load(path: str, loading: Loading) -> Sana:
    """Load a folder or Hub id with a SanaPipeline."""
    from diffusers import SanaPipeline

    pipeline = latents.load_pipeline(SanaPipeline, path, loading)
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return Sana(path, pipeline, flow_matching.schedule(pipeline, path, side), loading)
