"""Tiny vision-language models in folders as the Hub would have them, and what tests ask and show them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from tiny_vlm_models import BUILDERS, NEWER, STANDING, TEXT
from torch import Tensor

from mmalign.data.pairs import Turn

__all__ = ["BUILDERS", "NEWER", "STANDING", "TEXT"]


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """A tiny model of that type with its processor, in a folder."""
    torch.manual_seed(seed)
    model, processor = {**BUILDERS, **NEWER}[name]()
    for weight in model.parameters():  # far enough from each other that every token matters
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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
    """Logits [L, V] of a row's tokens, from the model's own forward pass over pixels: alone, at once, without a cache.

    The row is a conversation of one question with images, and what was said to it.
    """
    reader, model = family.reader, family.network.model
    prompt = reader._render([Turn("user", question)])
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


OBJECTS = ["red cube", "green ball", "dog", "cat", "blue mat", "car"]


def pairs(folder: Path, number: int = 8, layout: str = "trl") -> Path:
    """Rows of one of the layouts with pictures beside them; the rejected response names one object more."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(number):
        name = f"{n // 2}.png"  # two questions an image
        (folder / name).write_bytes(tiny.picture(n // 2, 16 + 8 * (n % 3)))
        asked = "What is in this image?" if n % 2 else "Describe it."
        said = f"There is a {OBJECTS[n % 6]}."
        texts = {"chosen": said, "rejected": f"There is a {OBJECTS[n % 6]} and a {OBJECTS[(n + 1) % 6]}."}
        turns = {
            side: [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": text}]
            for side, text in texts.items()
        }
        layouts: dict[str, dict[str, Any]] = {
            "trl": {"images": [name], "prompt": asked, **texts},
            "rlhfv": {"image": name, "question": asked, **texts},
            "mdpo": {"img_path": name, "prompt": f"USER: <image>\n{asked} ASSISTANT:", **texts},
            "povid": {
                "image": name,
                "conversations": turns["chosen"],
                "rejected_conversations": turns["rejected"],
            },
            "realign": {"image": name, "retrieved_image": f"{(n // 2 + 1) % (number // 2)}.png", **turns},
        }
        rows.append(layouts[layout])
    path = folder / f"{layout}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def recipe(model: Path, rows: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a tiny model; `train={...}` and so on add to its sections, `method={...}` takes its place."""
    base: dict[str, dict[str, Any]] = {
        "method": {"name": "dpo"},
        "model": {"path": str(model), "tune": "lora", "lora": {"rank": 2}},
        "data": {"format": "trl", "path": str(rows)},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-2, "save_every": 2, "log_every": 1, "trackers": []},
    }
    for name, section in sections.items():
        base[name] = section if name == "method" else {**base.get(name, {}), **section}
    return {**base, "output": str(output)}
