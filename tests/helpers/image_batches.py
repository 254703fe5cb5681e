"""Batches of image pairs with random latents, for tests of methods."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from mmalign.data.loaders.batches import EncodedPairs, EncodedPrompts
from mmalign.families.base import TextToImage
from mmalign.families.types import Conditioning, Moments
from mmalign.rewards import RewardModel, checked_reward_model

ROWS = [11, 2**62 + 3, 7, 12345]
PROMPTS = {11: "a red fox", 2**62 + 3: "a hen", 7: "two owls", 12345: "grass"}
OF_REJECTED = {11: "a dog", 2**62 + 3: "two hens", 7: "an owl", 12345: "moss"}


def pairs(family: TextToImage, rows: Sequence[int] = ROWS, std: float = 0.1) -> EncodedPairs:
    """Return pairs whose latents, prompts and sizes depend on the row's id alone."""
    sides = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in rows]
    mean = torch.stack(sides, dim=1).flatten(0, 1)
    sizes = torch.tensor([[16.0 + row % 9, 16, 0, row % 5, 16, 16] for row in rows]).repeat(2, 1)
    text, second = (
        Conditioning.cat([family.encode_prompts([some[row]]) for row in rows]) for some in (PROMPTS, OF_REJECTED)
    )
    moments = Moments(mean, torch.full_like(mean, std))
    return EncodedPairs(
        list(rows), moments, text, family.unconditional().expand(len(rows)), sizes, torch.ones(len(rows)), second
    )


def swapped(batch: EncodedPairs) -> EncodedPairs:
    """Exchange the chosen and the rejected sides; only latents without spread stay the same images."""
    swapped_rows = [*range(len(batch.rows), 2 * len(batch.rows)), *range(len(batch.rows))]
    latents = Moments(batch.latents.mean[swapped_rows], batch.latents.std[swapped_rows])
    return replace(batch, latents=latents, sizes=batch.sizes[swapped_rows])


def bright(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
    """Reward model that prefers light images."""
    return torch.tensor([sum(image.convert("L").histogram()[i] * i for i in range(256)) / 2560 for image in images])


def prompts(family: TextToImage, reward_model: RewardModel = bright, rows: Sequence[int] = ROWS[:3]) -> EncodedPrompts:
    """Return prompts for images of 16 pixels, with a judge of the images."""
    known = [PROMPTS[row] for row in rows]
    return EncodedPrompts(
        list(rows),
        known,
        Conditioning.cat([family.encode_prompts([prompt]) for prompt in known]),
        family.unconditional().expand(len(rows)),
        torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(rows)),
        tuple(family.encode_images(torch.zeros(1, 3, 16, 16)).mean.shape[1:]),
        torch.ones(len(rows)),
        checked_reward_model("bright", reward_model),
    )
