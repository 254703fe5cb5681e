"""Encoded batches as methods take them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image
from torch import Tensor

from mmalign.data.pairs import ResponsePair
from mmalign.families.types import Conditioning, ImageFeatures, ImageView, Moments
from mmalign.language.tokens import Tokens
from mmalign.rewards import RewardModel


@dataclass(frozen=True)
class EncodedResponses:
    """A batch of pairs as a method gets it, on the model's device.

    Attributes:
        rows: the id of each pair [B].
        tokens: of prompts with responses, [2B] rows.
        features: of every image of the batch, by its key.
        weights: [B]; 0 for a padding row.
        pairs: what the tokens were made of [B]; the images have been read, and cannot be read again.
        decoded_images: the decoded images by their keys, for methods that ask for them.
        views: the images as the model's reader takes them, by their keys, for further rows about them.
        other_images: of prompts that hold the pairs' other images, with the chosen responses, [B] rows, for methods
            that ask for them.
        max_length: tokens of a row, for methods that make further ones.
        precomputed: what has been worked out for these pairs beforehand, by name, each [B, ...]; None where nothing
            has.
    """

    rows: list[int]
    tokens: Tokens
    features: ImageFeatures
    weights: Tensor
    pairs: list[ResponsePair] = field(default_factory=list)
    decoded_images: Mapping[str, Image.Image] = field(default_factory=dict)
    views: Mapping[str, ImageView] = field(default_factory=dict)
    other_images: Tokens | None = None
    max_length: int = sys.maxsize
    precomputed: dict[str, Tensor] | None = None


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
        precomputed: what the method has worked out for these pairs beforehand, by name, each [B, ...]; None where it
            has not.
        prompts: the texts themselves [B].
        reward_model: what scores images, for methods whose settings name one.
    """

    rows: list[int]
    latents: Moments
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    weights: Tensor
    rejected_text: Conditioning | None = None
    precomputed: dict[str, Tensor] | None = None
    prompts: Sequence[str] = field(default_factory=list)
    reward_model: RewardModel | None = None

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
                precomputed=None,
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
        reward_model: what scores the images.
    """

    rows: list[int]
    prompts: Sequence[str]
    text: Conditioning
    unconditional: Conditioning
    sizes: Tensor
    shape: tuple[int, ...]
    weights: Tensor
    reward_model: RewardModel | None
