"""Images for vision-language models, and logits of a model's own forward pass over them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.language.chat import Turn


def picture(seed: int, size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = {
    "wide": picture(0),
    "tall": picture(1, (20, 40)),
    "square": picture(2, (24, 24)),
    "other wide": picture(3),
}


def own_logits(family: Any, ids: Sequence[int], question: str, images: Sequence[str]) -> Tensor:
    """Compute one row's logits [L, V] by the model's own forward pass over pixels, at once and without a cache.

    The row is a conversation: one question with images, and its response.
    """
    reader, model = family.processor, family.network.model
    prompt = reader.template.render([Turn("user", question)])
    encoded = reader.processor(text=[prompt], images=[[PICTURES[key] for key in images]], return_tensors="pt")
    more = len(ids) - encoded["input_ids"].shape[1]
    inputs = {k: v for k, v in encoded.items() if k not in ("labels", "input_ids", "attention_mask")}
    for name, filler in (("mm_token_type_ids", 0), ("token_type_ids", 1)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, more), value=filler)
    row = torch.tensor([list(ids)])
    with torch.no_grad():
        logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row), **inputs).logits[0].float()
    return logits
