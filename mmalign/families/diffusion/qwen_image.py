"""Qwen-Image: states of a Qwen2.5-VL, a video autoencoder, packed latents; flow matching.

Prompts are padded to the pipeline's limit, with a mask, so that they can be cached and batched. The network gets them
cut to the longest prompt of the batch, and does not attend to padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.types import Conditioning, Loading

TOKENS = 512  # limit of the prompt and the template's tail, as in the pipeline


class QwenImage(flow_matching.PackedModel):
    """Adapter of a QwenImagePipeline."""

    default_lora_targets = flow_matching.JOINT

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return last hidden states after the template's head, `embeds` [N, L, D], and `mask` [N, L]; float32."""
        pipeline = self.pipeline
        embeds, mask = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder.device, max_sequence_length=TOKENS
        )
        if mask is None:  # all have the same length
            return flow_matching.padded(list(embeds), TOKENS)
        return flow_matching.padded([row[is_text.bool()] for row, is_text in zip(embeds, mask, strict=True)], TOKENS)

    def unconditional(self) -> Conditioning:
        """Encode a single space, the negative prompt that the model's authors use."""
        return self.encode_prompts([" "])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        whole = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        limit = TOKENS + self.pipeline.prompt_template_encode_start_idx
        return latents.count_truncated(self.pipeline.tokenizer, whole, limit)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        number, _, height, width = x_t.shape
        # Tokens of x_t, then of the source image if there is one
        images = flow_matching.images(x_t, cond)
        mask = cond.tensors["mask"].bool()
        longest = int(mask.sum(1).max())
        with self.loading.autocast():
            tokens = net(
                torch.cat([flow_matching.pack(image) for image in images], 1),
                timestep=t,
                encoder_hidden_states=cond.tensors["embeds"][:, :longest],
                encoder_hidden_states_mask=mask[:, :longest],
                img_shapes=[[patches(image) for image in images]] * number,
                return_dict=False,
            )[0]
        # The answer at the tokens of x_t, one for each 2 x 2 patch
        return flow_matching.unpack(tokens[:, : height * width // 4], height, width)

    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """Return embeddings and scale; the pipeline rescales guided predictions to the norm of the conditional ones."""
        empty = self.unconditional().expand(len(prompts)) if sampling.guidance > 1 else None
        return guided(self.encode_prompts(prompts), empty, sampling.guidance)


def guided(cond: Conditioning, empty: Conditioning | None, scale: float) -> dict[str, object]:
    """Return the pipeline's arguments for prompts, against the negative ones if there are any."""
    text: dict[str, object] = {"true_cfg_scale": scale}
    for sign, embedded in (("", cond), ("negative_", empty)):
        if embedded is not None:
            text |= {
                f"{sign}prompt_embeds": embedded.tensors["embeds"],
                f"{sign}prompt_embeds_mask": embedded.tensors["mask"],
            }
    return text


def patches(image: Tensor) -> tuple[int, int, int]:
    """Return the frames, rows and columns of the tokens of latents [N, C, H, W]."""
    return 1, image.shape[-2] // 2, image.shape[-1] // 2


def load(path: str, loading: Loading) -> QwenImage:
    """Load a folder or Hub id with a QwenImagePipeline."""
    from diffusers import QwenImagePipeline

    return flow_matching.load(QwenImage, QwenImagePipeline, path, loading)
