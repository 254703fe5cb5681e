"""Pairs, caches and loaders of a recipe's data."""

from __future__ import annotations

from typing import Any

from mmalign.config import Data, ResponseData
from mmalign.data.data_module import DataModule, Splits
from mmalign.families.step_judge import StepJudge
from mmalign.modalities import step_judge
from mmalign.modalities.text_to_image import data as text_to_image
from mmalign.modalities.vision_language import data as vision_language


def open_data(data: Data, seed: int, method: Any = None) -> Splits:
    """Return the recipe's pairs, (training split, validation split or None), without decoding an image.

    Args:
        data: the recipe's section.
        seed: seed of the validation split.
        method: configuration of the method that reads the pairs; None accepts any pairs.

    Raises:
        ValueError: files or columns are missing, no pair remains, or none has the other images that the method needs.
    """
    modality: Any = vision_language if isinstance(data, ResponseData) else text_to_image
    splits: Splits = modality.open_pairs(data, seed, method)
    return splits


def build_data_module(family: Any, data: Data, **options: Any) -> DataModule:
    """Open the recipe's pairs, and for image data fill the caches of latents and text.

    Args:
        family: a TextToImage for ImageData, or a StepJudge with one; a VisionLanguage for ResponseData.
        data: the recipe's section.
        options: those of the modality's own `build_data_module`.

    Raises:
        ValueError: files, columns or caches do not fit, more than `data.max_bad_images` images are bad, or all pairs
            are bad.
    """
    modality: Any = vision_language if isinstance(data, ResponseData) else text_to_image
    if isinstance(family, StepJudge):
        modality = step_judge
    data_module: DataModule = modality.build_data_module(family, data, **options)
    return data_module
