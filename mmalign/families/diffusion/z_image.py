"""Z-Image: states of a Qwen3, a single-stream transformer; flow matching with reversed time.

The network's time is 1 - t, and it predicts the velocity towards the image, the negative of the other families'.
Prompts are padded with a mask as in Qwen-Image; the network gets a list of unpadded ones.

`guidance` is the scale of all families, 1 for none. The pipeline's own is one less, 0 for none (Z-Image-Turbo samples
at `guidance` 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.families.types import Conditioning, Loading

RESOLUTION = 1024  # pixels; not stated in the checkpoint
TOKENS = 512  # limit of the prompt with its chat template, as in the pipeline


class ZImage(LatentModel):
    """Adapter of a ZImagePipeline."""

    @property
    def resolution(self) -> int:
        """Side of an image, in pixels."""
        return RESOLUTION

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return penultimate states, `embeds` [N, L, D], and `mask` [N, L], 1 for text; float32."""
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return flow_matching.padded(rows, TOKENS)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        tokenizer = self.pipeline.tokenizer
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return latents.count_truncated(tokenizer, texts, TOKENS)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        images = list(x_t.unsqueeze(2).unbind())  # one-frame videos
        with self.loading.autocast():
            velocities = net(images, 1 - t, flow_matching.texts(cond), return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        text: dict[str, object] = {"prompt_embeds": flow_matching.texts(self.encode_prompts(prompts))}
        text |= {"guidance_scale": sampling.guidance - 1}
        if sampling.guidance > 1:
            text |= {"negative_prompt_embeds": flow_matching.texts(self.unconditional()) * len(prompts)}
        return text


def load(path: str, loading: Loading) -> ZImage:
    """Load a folder or Hub id with a ZImagePipeline."""
    from diffusers import ZImagePipeline

    return flow_matching.load(ZImage, ZImagePipeline, path, loading, side=RESOLUTION)
