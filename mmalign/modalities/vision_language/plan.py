"""Batches of response pairs on networks that have shapes alone, and the disk that caches of real ones take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from PIL import Image

from mmalign.config import Recipe, ResponseData
from mmalign.data.data_module import Splits
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.response_pairs import ResponseExample, ResponsePairReader, encode
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.language.chat import Turn
from mmalign.language.tokens import cut_tail
from mmalign.methods import Requirements
from mmalign.modalities import Example, loading
from mmalign.modalities.vision_language.model import token_limit

NUM_READ = 32  # pairs, evenly spaced; the longest ones make the batch
SIDE, WORDS = 672, 200  # of the image and of each response, where the pairs are not at hand


def encode_example(family: VisionLanguage, recipe: Recipe, needs: Requirements, splits: Splits | None) -> Example:
    """Return batches of the longest of some pairs; without pairs, of one image and two responses of usual sizes.

    Raises:
        ValueError: no pair can be read.
    """
    data = recipe.data
    assert isinstance(data, ResponseData)
    longest = token_limit(family.processor, data)
    reader = ResponsePairReader(family.processor, longest, needs.decoded_images, needs.other_images)
    # Pairs at hand, or one of usual sizes; responses that are generated are as long as allowed
    pairs = list(_usual_pairs(needs) if splits is None else _spaced(splits[0]))
    if needs.generates:
        chosen, rejected = ("word " * needs.new_tokens + end for end in ("one.", "two."))
        pairs = [replace(pair, chosen=chosen, rejected=rejected) for pair in pairs]
    read = [(pair, reader.read(pair, 0)) for pair in pairs]
    examples = [(pair, example) for pair, example in read if isinstance(example, ResponseExample)]
    if not examples:
        raise ValueError(f"data.path: none of {len(read)} pairs can be read; `mmalign doctor` names the reasons")
    if needs.generates:  # a word may be several tokens
        examples = [(pair, _cut(example, needs.new_tokens)) for pair, example in examples]
    # The longest first, so that a batch of any size has them
    examples.sort(key=lambda item: -_length(item[1]))

    def batch(size: int) -> EncodedResponses:
        chosen = list(islice(cycle(examples), size))
        collated = reader.collate([p for p, _ in chosen], [e for _, e in chosen], torch.ones(size))
        return encode(family, collated, longest)

    # Bytes of features by placeholder token, from the longest row's image
    caches, views = dict[str, int](), [view for _, example in examples for view in example.views.values()]
    cached = data.cache != "off" and not loading.adapts_images(family, recipe)
    if cached and views:
        (tensors,) = family.features_as_tensors(family.encode_images({"longest": views[0]})).values()
        each = sum(x.nbytes for x in tensors.values()) / len(views[0].ids)
        # All pairs have images of the examples' average size
        number = sum(len(part) for part in splits or () if part is not None)
        caches["features"] = int(number * each * sum(len(view.ids) for view in views) / len(examples))
    # Cached features replace the encoders, unless training changes images
    leaving = [name for name, _ in family.encoders()] if cached and not needs.vision_tower else []
    return Example(batch, caches, leaving, f"rows of {_length(examples[0][1]):,} tokens")


def _cut(example: ResponseExample, number: int) -> ResponseExample:
    """Return the example with responses of at most so many tokens."""
    return replace(example, responses=[cut_tail(row, row.start + number) for row in example.responses])


def _length(example: ResponseExample) -> int:
    return max(len(row.ids) for row in (*example.responses, example.other) if row is not None)


def _spaced(pairs: Any) -> Iterator[ResponsePair]:
    return (pairs[number] for number in range(0, len(pairs), max(1, len(pairs) // NUM_READ)))


def _usual_pairs(needs: Requirements) -> list[ResponsePair]:
    """Return one pair of usual sizes."""
    import io

    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "gray").save(content, "PNG")
    image = ImageRef("gray", lambda: "a gray image", content.getvalue)
    chosen, rejected = ("word " * WORDS + end for end in ("one.", "two."))
    others = (image,) if needs.other_images else ()
    turns = (Turn("user", "<image>Describe the image."),)
    pair = ResponsePair(0, turns, chosen, rejected, (image,), (image,), others, "a usual pair", "usual")
    if needs.learning == "pairs":
        return [pair]
    is_thumb = needs.learning == "thumbs"
    return [replace(pair, rejected="" if is_thumb else rejected, scores=(1.0,) if is_thumb else (1.0, 0.0))]
