"""Questions whose answers are generated while a vision-language model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image
from torch import nn

from mmalign.config import DecodingConfig, EvaluateResponses, Recipe
from mmalign.data.data_module import Splits
from mmalign.data.images import decode
from mmalign.data.pairs import ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.families.types import ImageView
from mmalign.language.chat import IMAGE
from mmalign.language.tokens import TokenizedResponse
from mmalign.modalities import Previews
from mmalign.rng import KeyedRNG


def check_samples(recipe: Recipe) -> None:
    """Check that `train.samples` is a number.

    Raises:
        ValueError: it is a file.
    """
    samples = recipe.train.samples
    if isinstance(samples, str):
        raise ValueError(f"train.samples: got {samples!r}; expected a number of questions, which come from data.path")


def open_previews(family: VisionLanguage, recipe: Recipe, splits: Splits) -> Previews:
    """Return the first `train.samples` prompts of the validation or training pairs that the model can read.

    Images are encoded once. The settings are those of `evaluate.decoding`, or the defaults without such a section.

    Raises:
        ValueError: no prompt can be read.
    """
    wanted, section = recipe.train.samples, recipe.evaluate
    assert isinstance(wanted, int), "preflight refuses a file"
    # Distinct prompts, without those whose images are bad
    pairs, asked, images = splits[1] or splits[0], dict[object, _Question](), dict[str, ImageView]()
    for index in range(len(pairs)):
        pair = pairs[index]
        key = (pair.turns, tuple(ref.key for ref in pair.images))
        if key in asked:
            continue
        try:
            asked[key] = _read_question(family, pair)
        except ValueError:  # training names it; BadImage is a ValueError
            continue
        images |= asked[key].views
        if len(asked) == wanted:
            break
    if not asked:
        raise ValueError("train.samples: no prompt and image of data.path can be read; set train.sample_every: null")
    questions = list(asked.values())
    features = family.encode_images(images)
    decoding = section.decoding if isinstance(section, EvaluateResponses) else DecodingConfig()

    def generate(net: nn.Module) -> list[str]:
        prompts, rng = [question.prompt for question in questions], KeyedRNG(recipe.train.seed)
        rows = [question.row for question in questions]
        return [answer.text.strip() for answer in family.generate(net, prompts, features, decoding, rows=rows, rng=rng)]

    settings = {"rows": [question.row for question in questions], "decoding": decoding.model_dump()}
    return Previews([q.title for q in questions], [q.image for q in questions], settings, generate, are_texts=True)


@dataclass(frozen=True)
class _Question:
    """Prompt of a pair: its key, its text, its tokens, and its images as the model and as a person sees them."""

    row: int
    title: str
    prompt: TokenizedResponse
    views: Mapping[str, ImageView]
    image: Image.Image | None


def _read_question(family: VisionLanguage, pair: ResponsePair) -> _Question:
    """Return the question of a pair.

    Raises:
        ValueError: an image cannot be read, or the prompt is too long.
    """
    decoded = {ref.key: decode(ref) for ref in pair.images}
    views = {key: family.processor.preprocess_image(image) for key, image in decoded.items()}
    prompt = family.processor.tokenize_prompt(pair.turns, [(ref.key, views[ref.key]) for ref in pair.images])
    if len(prompt.ids) >= family.processor.max_length:
        raise ValueError(f"{pair.location}: the prompt is too long")
    title = " ".join(pair.turns[-1].text.replace(IMAGE, " ").split())
    return _Question(pair.row, title, prompt, views, next(iter(decoded.values()), None))
