"""Batches and updates of BDHS on a tiny model."""

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.commands import train
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.responses import open_responses
from mmalign.data.loaders.batches import EncodedResponses
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.response_pairs import ResponsePairReader, encode
from mmalign.language.objects import coco_vocabulary
from mmalign.methods.vision_language import bdhs
from mmalign.policy import Policy
from mmalign.rng import KeyedRNG
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_vlm

DRAWS = KeyedRNG(0)
VOCABULARY = coco_vocabulary()


def made(vlm_folders: Folders, seed: int = 0, size: float = 0.3) -> Policy[Any]:
    """A policy with adapters that have learned something: without, it would equal its reference."""
    family: Any = load_vlm(vlm_folders("llava"))
    recipe = load_recipe(recipes.vlm(Path("x"), Path("y"), Path("z")))
    policy: Policy[Any] = train.build_policy(family, recipe)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return policy


def rows(folder: Path, hallucinated: dict[int, str] | None = None, **fields: str) -> Path:
    """Eight pairs; some get a hallucinated response, and all of them other fields, {n} being the pair's number."""
    path = data_files.response_pairs(folder)
    content = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(content):
        row |= {name: text.format(n=number) for name, text in fields.items()}
        row |= {"hallucinated": hallucinated[number]} if number in (hallucinated or {}) else {}
    path.write_text("\n".join(json.dumps(row) for row in content))
    return path


def batch(family: Any, path: Path, max_length: int = 256) -> EncodedResponses:
    """All pairs of a file at once."""
    pairs = open_responses("trl", str(path))
    reader = ResponsePairReader(family.processor, max_length, decoded_images=True)
    (read,) = Loader(pairs, reader, batch_size=len(pairs), seed=0).batches(0)
    return encode(family, read, max_length)


def stepped(method: Any, policy: Policy[Any], given: EncodedResponses, rng: KeyedRNG = DRAWS, **settings: Any) -> Any:
    """The one contrast of a batch, and what is made of it."""
    cfg = method.Config(**settings)
    with torch.no_grad():
        (contrast,) = method.contrasts(policy, given, cfg, rng)
    return contrast, method.loss(policy, contrast, cfg)


def said(contrast: bdhs.Contrast, family: Any, view: int) -> list[str]:
    """The responses of a view, as text."""
    tokens, number = contrast.batch.tokens, len(contrast.batch.rows)
    places = slice(view * number, (view + 1) * number)
    return [
        family.processor.decode(ids[mask].tolist()).strip()
        for ids, mask in zip(tokens.responses[places], tokens.response_mask[places], strict=True)
    ]
