"""Qwen-Image-Edit: a Qwen-Image whose text encoder and network also get a source image.

The network gets the source's tokens after those of the noisy latents, with a frame of their own. The source has the
size of the edited image, and the text encoder sees it in that size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.config import SamplingConfig
from mmalign.families.diffusion import flow_matching
from mmalign.families.diffusion import pipeline as latents
from mmalign.families.diffusion.qwen_image import TOKENS, QwenImage, guided, patches
from mmalign.families.types import Conditioning, Loading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class QwenImageEdit(QwenImage):
    """Adapter of a QwenImageEditPipeline."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Refuse prompts alone: the text encoder needs a source image."""
        raise ValueError(
            f"{self.name} is a {type(self.pipeline).__name__}, which edits a source image, and there is none; name its "
            "column with data.columns, such as {source: input_image}"
        )

    @torch.no_grad()
    def encode_edits(self, prompts: Sequence[str], sources: Tensor) -> Conditioning:
        """Return last hidden states after the template's head, `embeds` [N, L, D], and `mask` [N, L]; float32.

        L is the same for all prompts with sources of one size.
        """
        rows, length = [], 0
        for prompt, image in zip(prompts, latents.to_pil(sources), strict=True):
            row = self._encode(prompt, image)[0][0]
            own = len(self.pipeline.tokenizer(self._templated(prompt)).input_ids)  # one token for the image
            length = len(row) + self.pipeline.prompt_template_encode_start_idx - own + TOKENS
            rows.append(row[:length])
        return flow_matching.padded(rows, length)

    def unconditional_edits(self, sources: Tensor) -> Conditioning:
        """Encode a single space with each source."""
        return self.encode_edits([" "] * len(sources), sources)

    def _encode(self, prompt: str, image: Image.Image) -> tuple[Tensor, Tensor | None]:
        """Return the pipeline's embeddings [1, L, D] of a prompt with its source."""
        pipeline = self.pipeline
        return pipeline.encode_prompt([prompt], image=[image], device=pipeline.text_encoder.device)  # type: ignore[no-any-return]

    def _templated(self, prompt: str) -> str:
        return self.pipeline.prompt_template_encode.format(prompt)  # type: ignore[no-any-return]

    def count_truncated(self, prompts: Sequence[str]) -> int:
        limit = TOKENS + self.pipeline.prompt_template_encode_start_idx
        return latents.count_truncated(self.pipeline.tokenizer, [self._templated(prompt) for prompt in prompts], limit)

    def edit_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig, sources: Tensor) -> dict[str, object]:
        empty = self.unconditional_edits(sources) if sampling.guidance > 1 else None
        return guided(self.encode_edits(prompts, sources), empty, sampling.guidance)

    def attached(self, net: nn.Module, sources: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Append the sources' tokens to those of Qwen-Image's loop, for images of the sources' size.

        The pipeline's own loop scales a source to one megapixel, whatever the size of the edited image.
        """
        assert sources is not None, "encode_prompts names the missing source"
        x = self.encode_images(sources).mean
        shapes = [[patches(x)] * 2] * len(x)
        return flow_matching.attached(net, flow_matching.pack(x), img_shapes=shapes)

    @property
    def sampling_pipeline(self) -> DiffusionPipeline:
        """A Qwen-Image of the same parts."""
        from diffusers import QwenImagePipeline

        parts = {name: part for name, part in self.pipeline.components.items() if name != "processor"}
        pipeline = QwenImagePipeline(**parts)
        pipeline.encode_prompt = self.pipeline.encode_prompt  # Qwen-Image's cuts the tokens of a large source
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load(path: str, loading: Loading) -> QwenImageEdit:
    """Load a folder or Hub id with a QwenImageEditPipeline."""
    from diffusers import QwenImageEditPipeline

    return flow_matching.load(QwenImageEdit, QwenImageEditPipeline, path, loading)
