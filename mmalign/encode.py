"""From pairs and prompts to what a denoiser eats: latents and text embeddings, kept, or encoded batch by batch.

With a cache, `fill` runs the frozen encoders over every distinct image and prompt before training, and training reads
the results; both ways give the same numbers. B pairs; rows of images are chosen first, then rejected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmalign.data.cache import ArrayCache
from mmalign.data.loader import PairBatch, View, images_to_encode
from mmalign.data.pairs import Dropped, Pairs
from mmalign.data.prompts import PromptBatch
from mmalign.families import Conditioning, Moments, TextToImage
from mmalign.rewards import Judge

SHARD = 512  # items of a file of a cache


@dataclass(frozen=True)
class EncodedPairs:
    """A batch of pairs as a method gets it, on the model's device.

    Attributes:
        rows: the id of each pair [B].
        latents: of the images [2B, C, H, W].
        text: the prompts' conditioning [B].
        unconditional: one row, for dropped captions.
        sizes: of the images [2B, 6]: original height and width, crop top and left, target height and width.
        weights: [B]; 0 for a padding row.
        rejected_text: the conditioning of what the rejected images show [B]; None where the method asks for one prompt.
        kept: what the method has worked out for these pairs beforehand, by name, each [B, ...]; None where it has not.
        prompts: the texts themselves [B].
        judge: what scores images, for methods whose settings name one.
    """

    rows: list[int]
    latents: Moments
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    weights: Tensor
    rejected_text: Conditioning | None = None
    kept: dict[str, Tensor] | None = None
    prompts: Sequence[str] = field(default_factory=list)
    judge: Judge | None = None

    def singles(self) -> Iterator[EncodedPairs]:
        """Every pair in a batch of its own."""
        number = len(self.rows)
        for i in range(number):
            sides = slice(i, None, number)
            yield replace(
                self,
                rows=[self.rows[i]],
                latents=Moments(self.latents.mean[sides], self.latents.std[sides]),
                text=self.text[i : i + 1],
                sizes=self.sizes[sides],
                weights=self.weights[i : i + 1],
                rejected_text=self.rejected_text[i : i + 1] if self.rejected_text is not None else None,
                kept=None,
                prompts=self.prompts[i : i + 1],
            )


@dataclass(frozen=True)
class EncodedPrompts:
    """A batch of prompts as a method gets it that draws its own images, on the model's device.

    Attributes:
        rows: the id of each prompt [B].
        prompts: the texts themselves [B].
        text: their conditioning [B].
        unconditional: one row, what guidance goes away from.
        sizes: of the images to draw [B, 6], as in EncodedPairs.
        shape: of a latent: C, H, W.
        weights: [B]; 0 for a padding row.
        judge: what scores the images.
    """

    rows: list[int]
    prompts: Sequence[str]
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    shape: tuple[int, ...]
    weights: Tensor
    judge: Judge | None


@dataclass(frozen=True)
class Encoder:
    """Encodes batches with a family's frozen networks, or finds what they made in caches.

    Attributes:
        family: the model.
        unconditional: its conditioning without a prompt.
        text: where prompts' embeddings are kept; None encodes them in every batch.
        two_prompts: whether the method asks for the rejected images' prompts.
        judge: what scores images, for methods whose settings name one.
    """

    family: TextToImage
    unconditional: Conditioning
    text: ArrayCache | None
    two_prompts: bool = False
    judge: Judge | None = None

    def encode(self, batch: PairBatch) -> EncodedPairs:
        """One batch, on the denoiser's device."""
        device = next(self.family.network.parameters()).device
        if batch.arrays is not None:
            latents = Moments(batch.arrays["mean"].to(device), batch.arrays["std"].to(device))
        else:
            assert batch.pixels is not None
            latents = encode_images(self.family, batch.pixels)
        return EncodedPairs(
            rows=batch.rows,
            latents=latents,
            text=self._text(batch.prompts).to(device),
            unconditional=self.unconditional.to(device),
            sizes=batch.sizes.to(device),
            weights=batch.weights.to(device),
            rejected_text=self._text(batch.rejected_prompts).to(device) if self.two_prompts else None,
            prompts=batch.prompts,
            judge=self.judge,
        )

    def encode_prompts(self, batch: PromptBatch, side: int, shape: tuple[int, ...]) -> EncodedPrompts:
        """A batch of prompts for square images of `side` pixels, whose latents have this shape."""
        device = next(self.family.network.parameters()).device
        return EncodedPrompts(
            rows=batch.rows,
            prompts=batch.prompts,
            text=self._text(batch.prompts).to(device),
            unconditional=self.unconditional.to(device),
            sizes=torch.tensor([[side, side, 0, 0, side, side]] * len(batch.rows), device=device),
            shape=shape,
            weights=batch.weights.to(device),
            judge=self.judge,
        )

    def _text(self, prompts: Sequence[str]) -> Conditioning:
        if self.text is None:
            return encode_prompts(self.family, prompts)
        rows = [self.text.get(text_key(p)) for p in prompts]
        return Conditioning({name: torch.stack([row[name] for row in rows]).float() for name in rows[0]})


def encode_images(family: TextToImage, images: Tensor) -> Moments:
    """The posterior of images [N, 3, H, W].

    One at a time: a batch of another size rounds otherwise, and an image would have other latents in other company.
    """
    parts = [family.encode_images(image[None]) for image in images]
    return Moments(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


def encode_prompts(family: TextToImage, prompts: Sequence[str]) -> Conditioning:
    """The conditioning of prompts [N], one at a time, for the same reason."""
    return Conditioning.cat([family.encode_prompts([prompt]) for prompt in prompts])


def text_key(prompt: str) -> str:
    """The key of a prompt in the text cache: its hash, since a prompt may be long."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def fill_latents(
    family: TextToImage, pairs: Pairs, view: View, cache: ArrayCache, *, num_workers: int, rank: int, world_size: int
) -> Iterator[int | Dropped]:
    """Encode every image that the cache lacks; yields 1 for each, or the image that could not be read."""
    stored: dict[str, dict[str, Tensor]] = {}
    found = images_to_encode(pairs, view, cache, num_workers=num_workers, rank=rank, world_size=world_size)
    for image in found:
        if isinstance(image, Dropped):
            yield image
            continue
        moments = encode_images(family, image.pixels[None])
        stored[image.key] = {"mean": moments.mean[0].cpu(), "std": moments.std[0].cpu(), "sizes": image.sizes}
        if len(stored) == SHARD:
            cache.put(stored)
            stored = {}
        yield 1
    cache.put(stored)


def fill_text(
    family: TextToImage, prompts: Sequence[str], cache: ArrayCache, *, rank: int, world_size: int
) -> Iterator[int]:
    """Encode every prompt that the cache lacks; yields how many were stored."""
    there = {text_key(prompt): prompt for prompt in prompts}
    missing = cache.share(there, rank=rank, world_size=world_size)
    for start in range(0, len(missing), SHARD):
        keys = missing[start : start + SHARD]
        encoded = (encode_prompts(family, [there[key]]).tensors for key in keys)
        cache.put(
            {key: {name: x[0].cpu() for name, x in cond.items()} for key, cond in zip(keys, encoded, strict=True)}
        )
        yield len(keys)
