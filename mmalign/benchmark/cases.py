"""What a benchmark runs on without downloads: drawn pairs, and cases by name, each a recipe on random weights.

A case is a recipe like any other once its model and pairs are written, so what is changed about it is an override.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.benchmark import random_models as shapes

Content = dict[str, Any]  # of a recipe


@dataclass(frozen=True)
class Case:
    """A model of random weights, pairs for it, and how it is trained.

    Attributes:
        about: what it is, in a few words.
        write: writes the model to a folder.
        pairs: writes pairs to a path.
        content: the recipe, but for the paths of model, pairs and output.
        gpu: whether it needs one.
    """

    about: str
    write: Callable[[Path, torch.device], None]
    pairs: Callable[[Path], None]
    content: Content
    gpu: bool


def names() -> list[str]:
    """The cases there are."""
    return list(CASES)


def write_case(name: str, folder: Path, device: torch.device) -> Content:
    """Write a case's model and pairs into a folder, and give its recipe.

    Raises:
        ValueError: it needs a GPU, and there is none.
    """
    case = CASES[name]
    if case.gpu and device.type != "cuda":
        raise ValueError(
            f"bench: {name} ({case.about}) needs a CUDA device, and there is none; use "
            f"{' or '.join(other for other in CASES if not CASES[other].gpu)}, or a recipe"
        )
    given = content(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    case.write(folder / "model", device)
    case.pairs(Path(given["data"]["path"]))
    return given


def content(name: str, folder: Path) -> Content:
    """A case's recipe, with model and pairs in the folder."""
    given: Content = json.loads(json.dumps(CASES[name].content))
    given["model"]["path"] = str(folder / "model")
    given["data"]["path"] = str(folder / ("pairs.parquet" if "resolution" in given["data"] else "pairs.jsonl"))
    return {**given, "output": str(folder / "output")}


def draw_image_pairs(path: Path, resolution: int, number: int = 64) -> None:
    """Pairs of the bundled world: a picture of the prompt against one with a thing wrong."""
    import numpy as np

    from mmalign.synthesis.write_image_pairs import write_pairs
    from mmalign.toy import scenes

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = scenes.sample_prompts("train", number, seed=0)
    shown = [p for prompt in prompts for p in (prompt, scenes.corrupt(prompt, rng))]
    images = [scenes.draw(scenes.lay_out(p, rng)).resize((resolution, resolution)) for p in shown]
    captions = [str(prompt) for prompt in prompts for _ in range(2)]
    write_pairs(path, captions, images, [1.0, 0.0] * number, group=2, sure=0.5)


def draw_response_pairs(
    path: Path, *, side: int, prompt: int = 50, responses: tuple[int, int] = (100, 100), each: int = 1, number: int = 64
) -> None:
    """Pairs of random words about pictures of the bundled world, in TRL's layout.

    Args:
        path: a file of JSON lines; the pictures go beside it.
        side: of the pictures, in pixels.
        prompt: characters of a prompt.
        responses: characters of the chosen and of the rejected response.
        each: pairs of one picture and prompt.
        number: pairs in all.
    """
    import numpy as np

    from mmalign.toy import scenes

    path.parent.mkdir(parents=True, exist_ok=True)
    rng, letters = np.random.default_rng(0), random.Random(0)
    lines = []
    for start, scene in enumerate(scenes.sample_prompts("train", -(-number // each), seed=0)):
        name, asked = f"{path.stem}-{start}.png", _words(letters, prompt)
        scenes.draw(scenes.lay_out(scene, rng)).resize((side, side)).save(path.with_name(name))
        for _ in range(each):
            chosen, rejected = (_words(letters, length) for length in responses)
            lines.append({"prompt": f"<image>{asked}", "images": [name], "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:number]), encoding="utf-8")


def _words(letters: random.Random, length: int) -> str:
    """So many characters, of words with five letters."""
    word = [letters.choice(string.ascii_lowercase) for _ in range(length)]
    return "".join(" " if 0 < at < length - 1 and at % 6 == 5 else letter for at, letter in enumerate(word))


def _recipe(method: str, lr: float, data: Content, tune: str, batch_size: int, *, half: bool, **lora: Any) -> Content:
    """A recipe but for its paths; `lora` is its section, if there is any."""
    return {
        "method": {"name": method},
        "model": {"tune": tune, **({"lora": lora} if lora else {})},
        "data": data,
        "train": {
            "steps": 1,
            "batch_size": batch_size,
            "lr": lr,
            "precision": "bfloat16" if half else "float32",
        },
    }


def _checkpointed(content: Content) -> Content:
    return {**content, "train": {**content["train"], "gradient_checkpointing": True}}


_IMAGES = partial(_recipe, "diffusion_dpo", 1e-5)
_RESPONSES = partial(_recipe, "dpo", 1e-6, {"format": "trl"})
_SMALL = partial(shapes.stable_diffusion, unet=shapes.SMALL_UNET, vae=shapes.VAE_SMALL, text=shapes.CLIP_SMALL)
_SD15 = partial(shapes.stable_diffusion, unet=shapes.SD15_UNET, vae=shapes.VAE, text=shapes.CLIP_L)
_LLAVA_SMALL = partial(shapes.llava, text=shapes.LLAMA_SMALL, tower=shapes.VIT_SMALL)
_LLAVA = partial(shapes.llava, text=shapes.LLAMA_7B, tower=shapes.VIT_L)
_QWEN_PAIRS = partial(draw_response_pairs, side=896)  # 1,024 tokens an image

CASES = {
    "sd_middle": Case(
        "a Stable Diffusion of 128 and 256 channels, 128 pixels",
        _SMALL,
        partial(draw_image_pairs, resolution=128),
        _IMAGES({"resolution": 128}, "lora", 4, half=False, rank=16),
        gpu=False,
    ),
    "llava_middle": Case(
        "a LLaVA of 5 million parameters with 576 tokens an image",
        _LLAVA_SMALL,
        partial(draw_response_pairs, side=336),
        _RESPONSES("lora", 1, half=False, rank=16),
        gpu=False,
    ),
    "sd15_lora": Case(
        "Stable Diffusion 1.5, 512 pixels, LoRA",
        _SD15,
        partial(draw_image_pairs, resolution=512),
        _IMAGES({"resolution": 512}, "lora", 16, half=True, rank=8),
        gpu=True,
    ),
    "sd15_full": Case(
        "Stable Diffusion 1.5, 512 pixels, all weights",
        _SD15,
        partial(draw_image_pairs, resolution=512),
        _IMAGES({"resolution": 512}, "full", 16, half=True),
        gpu=True,
    ),
    "sdxl_lora": Case(
        "SDXL, 1024 pixels, LoRA",
        shapes.sdxl,
        partial(draw_image_pairs, resolution=1024),
        _checkpointed(_IMAGES({"resolution": 1024}, "lora", 4, half=True, rank=8)),
        gpu=True,
    ),
    "sdxl_full": Case(
        "SDXL, 1024 pixels, all weights",
        shapes.sdxl,
        partial(draw_image_pairs, resolution=1024),
        _checkpointed(_IMAGES({"resolution": 1024}, "full", 4, half=True)),
        gpu=True,
    ),
    "sd35m_lora": Case(
        "Stable Diffusion 3.5-medium, 1024 pixels, LoRA",
        shapes.sd35_medium,
        partial(draw_image_pairs, resolution=1024),
        _checkpointed(_IMAGES({"resolution": 1024}, "lora", 4, half=True, rank=8)),
        gpu=True,
    ),
    "llava15_7b": Case(
        "LLaVA-1.5-7B, 576 tokens an image, LoRA",
        _LLAVA,
        partial(draw_response_pairs, side=336),
        _checkpointed(_RESPONSES("lora", 4, half=True, rank=128)),
        gpu=True,
    ),
    "qwen25vl_7b": Case(
        "Qwen2.5-VL-7B, 1,024 tokens an image, LoRA",
        shapes.qwen25_vl,
        _QWEN_PAIRS,
        _checkpointed(_RESPONSES("lora", 2, half=True, rank=64)),
        gpu=True,
    ),
}
