"""Prompts whose images are generated while a text-to-image model trains."""

from __future__ import annotations

from PIL import Image
from torch import nn

from mmalign.config import EvaluateImages, ImageData, Recipe, SamplingConfig
from mmalign.data.data_module import Splits
from mmalign.data.formats.prompts import Prompt, sources_of
from mmalign.evaluation.generate_images import read_sources
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.modalities import Previews
from mmalign.modalities.prompts import read_prompts
from mmalign.modalities.text_to_image.model import check_prompt_sources


def check_samples(recipe: Recipe) -> None:
    """Check the file of `train.samples`, if it is one.

    Raises:
        ValueError: the file is missing, is not text, or has no prompt.
    """
    if isinstance(recipe.train.samples, str):
        given = any(prompt.source for prompt in read_prompts("train.samples", recipe.train.samples))
        check_prompt_sources("train.samples", recipe.model, given=given)


def open_previews(family: TextToImage, recipe: Recipe, splits: Splits) -> Previews:
    """Return the prompts of `train.samples`: those of a file, or the first ones of the validation or training pairs.

    The settings are those of `evaluate.sampling`; without such a section, defaults at the resolution of the training.

    Raises:
        ValueError: the file is missing, is not text, or has no prompt.
    """
    wanted, section = recipe.train.samples, recipe.evaluate
    assert isinstance(recipe.data, ImageData)
    # Prompts of a file, or distinct ones of pairs: held out if there are any
    if isinstance(wanted, str):
        asked = read_prompts("train.samples", wanted)
    else:
        pairs = splits[1] or splits[0]
        every = (Prompt(pair.prompt, pair.source) for pair in (pairs[index] for index in range(len(pairs))))
        asked = list({(prompt.text, prompt.source and prompt.source.key): prompt for prompt in every}.values())[:wanted]
    prompts, sources = [prompt.text for prompt in asked], sources_of(asked)
    # Sampled as in the evaluation, if there is one
    sampling = SamplingConfig(resolution=recipe.data.resolution)
    if isinstance(section, EvaluateImages):
        sampling = section.sampling
    shown = read_sources(family, sources, sampling) if sources is not None else None
    seeds = [recipe.train.seed * 1_000_003 + index for index in range(len(prompts))]

    def generate(net: nn.Module) -> list[Image.Image]:
        images = list[Image.Image]()
        for start in range(0, len(prompts), sampling.batch_size):
            batch = slice(start, start + sampling.batch_size)
            edited = shown[batch] if shown is not None else None
            images += family.sample(net, prompts[batch], seeds[batch], sampling, edited)
        return images

    settings = {"seeds": seeds, "sampling": sampling.model_dump()}
    settings |= {"sources": [source.key for source in sources]} if sources is not None else {}
    return Previews(prompts, to_pil(shown) if shown is not None else [], settings, generate)
