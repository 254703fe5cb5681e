"""Batches of image pairs that have shapes alone, and the disk that caches of real ones take."""

from __future__ import annotations

import torch

from mmalign.config import ImageData, ImageModel, Recipe
from mmalign.config.base import ImageSize
from mmalign.data.data_module import Splits
from mmalign.data.loaders.batches import EncodedPairs
from mmalign.data.loaders.encoder import encode_prompts
from mmalign.families.base import TextToImage
from mmalign.families.editing import SOURCE
from mmalign.families.types import Conditioning, Moments
from mmalign.methods import Requirements
from mmalign.modalities import Example

SMALL = 512  # pixels of a side to which a card that is too small may go down
NUM_READ = 32  # lists whose lengths are read
BYTES = 4  # of a number in the caches, float32


def encode_example(family: TextToImage, recipe: Recipe, needs: Requirements, splits: Splits | None) -> Example:
    """Return batches like those of training: one size for all images, buckets have its area, and one length of text."""
    data = recipe.data
    assert isinstance(data, ImageData)
    width, height = size = ImageSize.parse(data.resolution or family.resolution)
    image = torch.zeros(1, 3, height, width)
    latents, source = family.encode_images(image), image if _has_sources(family, splits) else None
    text = encode_prompts(family, ["a prompt"], source)
    unconditional = family.unconditional() if source is None else family.unconditional_edits(source)
    per_row = {SOURCE: latents.mean} if source is not None else {}
    outputs = _num_outputs(needs, splits)

    # One row again and again, since shapes alone count
    def batch(number: int) -> EncodedPairs:
        repeated = [latents] * outputs * number
        return EncodedPairs(
            rows=list(range(number)),
            latents=Moments(torch.cat([x.mean for x in repeated]), torch.cat([x.std for x in repeated])),
            text=Conditioning({**text.tensors, **per_row}).repeat(number),
            unconditional=Conditioning({**unconditional.tensors, **per_row}).expand(number),
            sizes=torch.tensor([[height, width, 0, 0, height, width]] * outputs * number),
            weights=torch.ones(number),
            rejected_text=Conditioning({**text.tensors, **per_row}).repeat(number) if needs.prompt_pairs else None,
            prompts=["a prompt"] * number,
            scores=torch.arange(outputs, 0, -1.0).expand(number, outputs),
        )

    # Caches, and encoders that are not needed once they are filled
    parts = [pairs for pairs in splits or () if pairs is not None]
    caches, leaving, num_pairs = dict[str, int](), list[str](), sum(map(len, parts))
    if data.cache != "off":
        in_text = source is not None and family.editing is not None and family.editing.in_text
        # Each view of a source with its prompt and without one
        prompts = {prompt for pairs in parts for prompt in pairs.prompts()}
        number = 2 * (1 + data.flip) * num_pairs if in_text else len(prompts)
        caches["text"] = sum(BYTES * x[0].numel() for x in text.tensors.values()) * number
        leaving = [name for name, _ in family.encoders() if name != "vae"]
        if data.crop == "center" and not needs.generates:
            # Each image of a row and its source, also mirrored
            images = (outputs + (source is not None)) * (1 + data.flip) * num_pairs
            caches["latents"] = 2 * BYTES * latents.mean[0].numel() * images  # means and deviations
            leaving += [] if needs.vae_decoder else ["vae"]
    assert isinstance(recipe.model, ImageModel)
    offload = recipe.model.offload
    remedies = (
        *([] if offload else ["model.offload=true"]),
        *([f"data.resolution={SMALL}"] if max(size) > SMALL else []),
    )
    return Example(batch, caches, leaving, f"images of {width} x {height} pixels", remedies, offload)


def _has_sources(family: TextToImage, splits: Splits | None) -> bool:
    """Return whether pairs have source images; without pairs, whether the model edits."""
    return family.editing is not None and (splits is None or splits[0][0].source is not None)


def _num_outputs(needs: Requirements, splits: Splits | None) -> int:
    """Return the most images of a row, by the first rows."""
    if needs.learning != "lists":
        return 1 if needs.learning == "thumbs" else 2
    return 4 if splits is None else max(len(row.outputs) for row in splits[0][:NUM_READ])
