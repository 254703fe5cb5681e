"""Modified images of chosen responses, shared by methods that crop or add noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from PIL import Image

from mmalign.data.loaders.batches import EncodedResponses
from mmalign.families.base import VisionLanguage
from mmalign.families.types import ImageFeatures, ImageView
from mmalign.language.tokens import Tokens

ImageChange = Callable[[Image.Image, int, int], Image.Image]


def with_changed_images(
    family: VisionLanguage, batch: EncodedResponses, change: ImageChange
) -> tuple[Tokens, ImageFeatures]:
    """Return the chosen rows [B] with modified images in their prompts, and the features of these images.

    Args:
        family: the model. Its frozen vision tower encodes the images, so policy and reference get the same features.
        batch: the pairs, with `decoded_images`.
        change: a map from (image, the pair's row id, the image's index in the prompt) to an image of the same size.
    """
    chosen, views, keys = batch.tokens[: len(batch.rows)], dict[str, ImageView](), list[tuple[str, ...]]()
    for row, images in zip(batch.rows, chosen.images, strict=True):
        # A name for each change, since rows may share an image
        named = [(f"{key}, disturbed for {row}, {place}", place, key) for place, key in enumerate(images)]
        views |= {
            new: family.processor.preprocess_image(change(batch.decoded_images[key], row, place))
            for new, place, key in named
        }
        keys.append(tuple(new for new, _, _ in named))
    return replace(chosen, images=tuple(keys)), family.encode_images(views)
