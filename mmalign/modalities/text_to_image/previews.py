"""Prompts whose images are generated while a text-to-image model trains."""

from __future__ import annotations

from PIL import Image
from torch import nn

from mmalign.config import EvaluateImages, ImageData, Recipe, SamplingConfig
from mmalign.data.data_module import Splits
from mmalign.families.base import TextToImage
from mmalign.modalities import Previews
from mmalign.modalities.prompts import read_prompts


def check_samples(recipe: Recipe) -> None:
    """Check the file of `train.samples`, if it is one.

    Raises:
        ValueError: the file is missing, is not text, or has no prompt.
    """
    if isinstance(recipe.train.samples, str):
        read_prompts("train.samples", recipe.train.samples)


def open_previews(family: TextToImage, recipe: Recipe, splits: Splits) -> Previews:
    """Return the prompts of `train.samples`: those of a file, or the first ones of the validation or training pairs.

    The settings are those of `evaluate.sampling`; without such a section, defaults at the resolution of the training.

    Raises:
        ValueError: the file is missing, is not text, or has no prompt.
    """
    wanted, section = recipe.train.samples, recipe.evaluate
    assert isinstance(recipe.data, ImageData)
    if isinstance(wanted, str):
        prompts = read_prompts("train.samples", wanted)
    else:
        pairs = splits[1] or splits[0]
        distinct = dict.fromkeys(pairs[index].prompt for index in range(len(pairs)))
        prompts = list(distinct)[:wanted]
    sampling = SamplingConfig(resolution=recipe.data.resolution)
    if isinstance(section, EvaluateImages):
        sampling = section.sampling
    seeds = [recipe.train.seed * 1_000_003 + index for index in range(len(prompts))]

    def generate(net: nn.Module) -> list[Image.Image]:
        images = list[Image.Image]()
        for start in range(0, len(prompts), sampling.batch_size):
            batch = slice(start, start + sampling.batch_size)
            images += family.sample(net, prompts[batch], seeds[batch], sampling)
        return images

    return Previews(prompts, (), {"seeds": seeds, "sampling": sampling.model_dump()}, generate)
