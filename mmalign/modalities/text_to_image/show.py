"""Image pairs as the model will see them: after crop, flip and bucket, and the numbers of all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mmalign.config import ImageData, ImageSize, Recipe
from mmalign.data.data_module import Splits
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.image_pairs import PIXELS, SIZES, ImagePairReader
from mmalign.data.loaders.sampler import Balance, EpochSampler
from mmalign.data.pairs import ImagePair, Pairs, output_names
from mmalign.data.shapes import summarize_cuts
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.loading import load_family
from mmalign.families.shapes import META, fetch_configurations
from mmalign.families.types import Loading
from mmalign.methods import requirements_of
from mmalign.modalities.loading import disable_progress_bars
from mmalign.modalities.text_to_image.data import pair_shapes
from mmalign.modalities.text_to_image.model import pipeline_path
from mmalign.pages.examples import DataView, ExampleSide, TrainingExample
from mmalign.resources import resolve_model


def show(recipe: Recipe, splits: Splits, number: int) -> DataView:
    """Return the sizes of the recipe's images, and its first examples; only the model's configurations are loaded.

    A step judge sees the pairs as its frozen text-to-image model encodes them.

    Raises:
        ValueError: the model's configurations are not at hand.
    """
    data, needs, train = recipe.data, requirements_of(recipe.method), splits[0]
    assert isinstance(data, ImageData)
    disable_progress_bars()
    # Configurations alone: networks have no weights
    path = fetch_configurations(resolve_model(pipeline_path(recipe.model)), recipe.model.revision)
    family = load_family(path, Loading(META, revision=recipe.model.revision), recipe.model.family)
    sources = [pairs for pairs in splits if pairs is not None]
    facts = list(_truncated(family, sources))
    # Prompts alone have no images to measure
    if needs.generates:
        order = EpochSampler(len(train), 1, recipe.train.seed).order(0)
        return DataView(facts, [TrainingExample(train[n].location, train[n].prompt) for n in order[:number]])
    shapes = pair_shapes(sources, data, ImageSize.parse(data.resolution or family.resolution), family.size_multiple)
    if shapes.sizes:
        by_area = sorted(shapes.sizes.values(), key=math.prod)
        median = by_area[len(by_area) // 2]
        facts.append(f"{len(by_area):,} different images: {by_area[0]} to {by_area[-1]} pixels, median {median}")
    facts += summarize_cuts(shapes, sources, pad=data.fit == "pad")
    # The first examples of the first epoch, in the training's order
    transform = ImageTransform(data.crop, data.flip, pad=data.fit == "pad")
    balance = Balance.of(train, needs.liked_share)
    order = EpochSampler(len(train), 1, recipe.train.seed, shapes=shapes.of_all(train), balance=balance).order(0)
    reader = ImagePairReader(shapes, transform, recipe.train.seed)
    return DataView(facts, list(map(partial(_example, reader), (train[n] for n in order[:number]))))


def _truncated(family: TextToImage, sources: Sequence[Pairs[Any]]) -> Iterator[str]:
    prompts = sorted({prompt for pairs in sources for prompt in pairs.prompts()})
    cut = family.count_truncated(prompts)
    yield f"{len(prompts):,} different prompts; {cut:,} exceed the text encoder's limit and will be truncated"


def _example(reader: ImagePairReader, pair: ImagePair) -> TrainingExample:
    title = f"{pair.prompt} (rejected: {pair.rejected_prompt})" if pair.rejected_prompt else pair.prompt
    example = reader.read(pair, 0)
    if isinstance(example, list):
        return TrainingExample(pair.location, title, skipped=[str(row) for row in example])
    sides = []
    names = [*output_names(len(pair.outputs), pair.scores), "source"]
    for name, pixels, sizes in zip(names, example[PIXELS], example[SIZES], strict=False):
        # Size after scaling, then the corner of the crop
        height, width, top, left, *_ = sizes.tolist()
        (image,) = to_pil(pixels[None])
        place = f", cut at {left}, {top} of the scaled image" if top or left else ""
        note = f"{image.width}x{image.height} from {width}x{height}{place}"
        sides.append(ExampleSide(name, note, images={"as trained": image}))
    return TrainingExample(pair.location, title, sides)
