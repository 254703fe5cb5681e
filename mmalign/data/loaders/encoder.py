"""Encoder of image pairs and prompts to latents and text embeddings, cached or computed per batch.

With a cache, `mmalign.data.caches.fill` runs the frozen encoders on every distinct image and prompt before training.
Cached and computed results are equal. B pairs; rows of images are chosen first, then rejected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.loaders.batches import EncodedPairs, EncodedPrompts
from mmalign.data.loaders.image_pairs import ImagePairBatch, SourceImages
from mmalign.data.loaders.prompts import PromptBatch
from mmalign.families.base import TextToImage
from mmalign.families.editing import SOURCE
from mmalign.families.types import Conditioning, Moments
from mmalign.rewards import RewardModel


@dataclass(frozen=True)
class Encoder:
    """Encoder of batches with a family's frozen networks and caches.

    Attributes:
        family: the model.
        unconditional: its conditioning without a prompt, one row; None if the text encoder sees the pairs' sources.
        text: the cache of text embeddings; None encodes prompts in every batch.
        prompt_pairs: the method uses the rejected images' own prompts.
        reward_model: the reward model that scores images, for methods whose settings name one.
    """

    family: TextToImage
    unconditional: Conditioning | None
    text: ArrayCache | None
    prompt_pairs: bool = False
    reward_model: RewardModel | None = None

    def encode(self, batch: ImagePairBatch) -> EncodedPairs:
        """Return an encoded batch of pairs on the denoiser's device."""
        # Latents, from the cache or encoded now
        device = next(self.family.network.parameters()).device
        if batch.arrays is not None:
            latents = Moments(batch.arrays["mean"].to(device), batch.arrays["std"].to(device))
        else:
            assert batch.pixels is not None
            latents = encode_images(self.family, batch.pixels)
        # Sources of edits are the means of their latents, without a draw
        sources = batch.sources
        if sources is not None and sources.latents is None:
            assert sources.pixels is not None
            sources = replace(sources, latents=encode_images(self.family, sources.pixels).mean)
        # Text of the prompts, of no prompt and of the rejected prompts
        text = partial(self._text, sources=sources, device=device)
        return EncodedPairs(
            rows=batch.rows,
            latents=latents,
            text=text(batch.prompts),
            unconditional=text([""] * len(batch.rows)),
            sizes=batch.sizes.to(device),
            weights=batch.weights.to(device),
            rejected_text=text(batch.rejected_prompts) if self.prompt_pairs else None,
            prompts=batch.prompts,
            reward_model=self.reward_model,
            labels=None if batch.labels is None else batch.labels.to(device),
            scores=batch.scores.to(device),
        )

    def encode_prompts(self, batch: PromptBatch, size: ImageSize, shape: tuple[int, ...]) -> EncodedPrompts:
        """Return an encoded batch of prompts for images of one size, with latents of this shape."""
        device, (width, height) = next(self.family.network.parameters()).device, size
        return EncodedPrompts(
            rows=batch.rows,
            prompts=batch.prompts,
            text=self._text(batch.prompts, None, device),
            unconditional=self._text([""] * len(batch.rows), None, device),
            sizes=torch.tensor([[height, width, 0, 0, height, width]] * len(batch.rows), device=device),
            shape=shape,
            weights=batch.weights.to(device),
            reward_model=self.reward_model,
        )

    def _text(self, prompts: Sequence[str], sources: SourceImages | None, device: torch.device) -> Conditioning:
        """Return the conditioning of prompts with their sources [B]; an empty prompt stands for none."""
        # Sources are a part of the text embedding only where the text encoder sees them
        seen = sources if self.unconditional is None else None
        if self.unconditional is not None and not any(prompts):
            text = self.unconditional.expand(len(prompts))
        elif self.text is not None:
            keys = seen.keys if seen is not None else [""] * len(prompts)
            rows = [self.text.get(text_key(prompt, key)) for prompt, key in zip(prompts, keys, strict=True)]
            text = Conditioning({name: torch.stack([row[name] for row in rows]).float() for name in rows[0]})
        else:
            text = encode_prompts(self.family, prompts, seen.pixels if seen is not None else None)
        text = text.to(device)
        # The denoiser of edits reads the source's latents from the conditioning
        if sources is None:
            return text
        assert sources.latents is not None, "sources are encoded before the prompts"
        return Conditioning({**text.tensors, SOURCE: sources.latents.to(device)})


def encode_images(family: TextToImage, images: Tensor) -> Moments:
    """Return the latent posterior of images [N, 3, H, W].

    Images are encoded one at a time. Rounding depends on the batch size, so batching would change an image's latents.
    """
    parts = [family.encode_images(image[None]) for image in images]
    return Moments(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


def encode_prompts(family: TextToImage, prompts: Sequence[str], sources: Tensor | None = None) -> Conditioning:
    """Return the conditioning of prompts [N], encoded one at a time, like images.

    With sources [N, 3, H, W] it is that of edits, and an empty prompt stands for none.
    """
    if sources is None:
        return Conditioning.cat([family.encode_prompts([prompt]) for prompt in prompts])
    return Conditioning.cat(
        [
            family.encode_edits([prompt], source[None]) if prompt else family.unconditional_edits(source[None])
            for prompt, source in zip(prompts, sources, strict=True)
        ]
    )


def text_key(prompt: str, source: str = "") -> str:
    """Return the key of a prompt in the text cache: a hash, because prompts may be long.

    `source` is the key of the source image that the text encoder sees too.
    """
    text = f"{prompt}\0{source}" if source else prompt
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
