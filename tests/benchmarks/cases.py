"""Cases for benchmarks without downloads: a recipe on random weights, with synthetic pairs.

With its model and pairs written, a case is a recipe like any other, so overrides apply.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.synthesis.write_image_pairs import write_pairs
from mmalign.toy import scenes
from tests.benchmarks import random_models

Content = dict[str, Any]  # a recipe's content


@dataclass(frozen=True)
class Case:
    """A random model, pairs for it, and its training.

    Attributes:
        model: a key of `random_models.MODELS`.
        side: the side of an image, in pixels.
        batch_size: the number of pairs at a time.
        rank: the rank of LoRA; 0 trains all weights.
        about: a description.
        gpu: True for a model of real size, which needs a GPU, bfloat16, and often gradient checkpointing.
        gradient_checkpointing: True if activations are checkpointed.
    """

    model: str
    side: int
    batch_size: int
    rank: int
    about: str
    gpu: bool = True
    gradient_checkpointing: bool = True

    @property
    def has_images(self) -> bool:
        """True if the pairs are of images, not of responses."""
        return "pipeline" in random_models.MODELS[self.model]


CASES = {
    "sd_middle": Case("sd_middle", 128, 4, 16, "a Stable Diffusion of 128 and 256 channels", False, False),
    "llava_middle": Case(
        "llava_middle", 336, 1, 16, "a LLaVA of 5 million parameters, 576 tokens an image", False, False
    ),
    "sd15_lora": Case("sd15", 512, 16, 8, "Stable Diffusion 1.5", gradient_checkpointing=False),
    "sd15_full": Case("sd15", 512, 16, 0, "Stable Diffusion 1.5", gradient_checkpointing=False),
    "sdxl_lora": Case("sdxl", 1024, 4, 8, "SDXL"),
    "sdxl_full": Case("sdxl", 1024, 4, 0, "SDXL"),
    "sd35m_lora": Case("sd35_medium", 1024, 4, 8, "Stable Diffusion 3.5-medium"),
    "llava15_7b": Case("llava_7b", 336, 4, 128, "LLaVA-1.5-7B, 576 tokens an image"),
    "qwen25vl_7b": Case("qwen25_vl_7b", 896, 2, 64, "Qwen2.5-VL-7B, 1,024 tokens an image"),
}


def content(name: str, folder: Path) -> Content:
    """Return a case's recipe, with model and pairs in the folder."""
    case = CASES[name]
    lora: Content = {"tune": "lora", "lora": {"rank": case.rank}} if case.rank else {"tune": "full"}
    data = {"resolution": case.side} if case.has_images else {"format": "trl"}
    return {
        "method": {"name": "diffusion_dpo" if case.has_images else "dpo"},
        "model": {"path": str(folder / "model"), **lora},
        "data": {"path": str(folder / ("pairs.parquet" if case.has_images else "pairs.jsonl")), **data},
        "train": {
            "steps": 1,
            "batch_size": case.batch_size,
            "lr": 1e-5 if case.has_images else 1e-6,
            "precision": "bfloat16" if case.gpu else "float32",
            "gradient_checkpointing": case.gradient_checkpointing,
        },
        "output": str(folder / "output"),
    }


def content_of(source: str | Path | Mapping[str, Any], folder: Path) -> str | Path | Mapping[str, Any]:
    """Return a case's recipe if the source names a case, else the source."""
    return content(str(source), folder) if isinstance(source, str) and source in CASES else source


def write_case(name: str, folder: Path, device: torch.device) -> Content:
    """Write a case's model and pairs into a folder, and return its recipe.

    Raises:
        ValueError: the case needs a GPU, and there is none.
    """
    case, recipe = CASES[name], content(name, folder)
    if case.gpu and device.type != "cuda":
        small = " or ".join(other for other, given in CASES.items() if not given.gpu)
        raise ValueError(f"{name} ({case.about}) needs a CUDA device, and there is none; use {small}, or a recipe")
    folder.mkdir(parents=True, exist_ok=True)
    random_models.write(case.model, folder / "model", device)
    if case.has_images:
        write_image_pairs(Path(recipe["data"]["path"]), case.side)
    else:
        write_response_pairs(Path(recipe["data"]["path"]), side=case.side)
    return recipe


def open_source(source: str | Path | Mapping[str, Any], folder: Path, accelerator: Any) -> Any:
    """Return the source, or a case's recipe after the main process has written its model and pairs to the folder."""
    if isinstance(source, str) and source in CASES and accelerator.is_main_process:
        write_case(source, folder / source, accelerator.device)
    accelerator.wait_for_everyone()
    return content_of(source, folder / str(source)) if isinstance(source, str) else source


def write_image_pairs(path: Path, resolution: int, number: int = 64) -> None:
    """Write pairs of the bundled world: an image of the prompt, and one with an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = scenes.sample_prompts("train", number, seed=0)
    shown = [p for prompt in prompts for p in (prompt, scenes.corrupt(prompt, rng))]
    images = [scenes.render(scenes.place_objects(p, rng)).resize((resolution, resolution)) for p in shown]
    captions = [str(prompt) for prompt in prompts for _ in range(2)]
    write_pairs(path, captions, images, [1.0, 0.0] * number, group=2, min_confidence=0.5)


def write_response_pairs(
    path: Path, *, side: int, prompt: int = 50, responses: tuple[int, int] = (100, 100), each: int = 1, number: int = 64
) -> None:
    """Write pairs of random words about images of the bundled world, in TRL's layout.

    Args:
        path: a file of JSON lines; the images go beside it.
        side: the side of the images, in pixels.
        prompt: the number of characters of a prompt.
        responses: the numbers of characters of the chosen and of the rejected response.
        each: the number of pairs per image and prompt.
        number: the total number of pairs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, letters = np.random.default_rng(0), random.Random(0)
    lines = []
    for start, scene in enumerate(scenes.sample_prompts("train", -(-number // each), seed=0)):
        name, question = f"{path.stem}-{start}.png", _words(letters, prompt)
        scenes.render(scenes.place_objects(scene, rng)).resize((side, side)).save(path.with_name(name))
        for _ in range(each):
            chosen, rejected = (_words(letters, length) for length in responses)
            lines.append({"prompt": f"<image>{question}", "images": [name], "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:number]), encoding="utf-8")


def _words(letters: random.Random, length: int) -> str:
    """Return a text of `length` characters, in words of five letters."""
    word = [letters.choice(string.ascii_lowercase) for _ in range(length)]
    return "".join(" " if 0 < i < length - 1 and i % 6 == 5 else letter for i, letter in enumerate(word))
