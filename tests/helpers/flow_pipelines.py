"""Images of diffusers' own flow-matching pipelines, and their latents after each step."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    QwenImageEditPlusPipeline,
)
from PIL import Image
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.editing import EDITORS
from tests.helpers import flow_models

PROMPTS = ["a red fox in the long grass", "a hen"]


SEEDS = [3, 4]


SIZE = ImageSize(64, 32)  # Sana generates multiples of 32 alone


# How each pipeline is told that it should guide with scale 3, in our unit, against what the family has for no prompt.
GUIDED: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 3.0},
    "sd3_without_t5": {"guidance_scale": 3.0},
    "flux": {"guidance_scale": 3.0},
    "flux_schnell": {},
    "flux2": {"guidance_scale": 3.0},
    "z_image": {"guidance_scale": 2.0, "negative_prompt": ["", ""]},
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "sana": {"guidance_scale": 3.0, "use_resolution_binning": False},
    "flux_kontext": {"guidance_scale": 3.0},
    "qwen_image_edit": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "qwen_image_edit_plus": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
}


# How each is told not to, or to tell its network what training tells it.
PLAIN: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 1.0},
    "sd3_without_t5": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 3.5},
    "flux_schnell": {},
    "flux2": {"guidance_scale": 4.0},
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "flux_kontext": {"guidance_scale": 3.5},
    "qwen_image_edit": {"true_cfg_scale": 1.0},
    "qwen_image_edit_plus": {"true_cfg_scale": 1.0},
}


SOURCES = flow_models.sources(2, *SIZE)


def own(name: str, path: Path) -> Any:
    """The pipeline as its users load it; diffusers wants to hear that a part is to be left out."""
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_without_t5" else {}
    return DiffusionPipeline.from_pretrained(path, **left_out)


def by_hand(pipeline: Any, steps: int, **how: Any) -> tuple[list[Image.Image], list[Tensor]]:
    """Return what the pipeline draws of the text, and its latents after each step, as it holds them."""
    seen: list[Tensor] = []

    def watch(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    def drawn(rows: slice) -> list[Image.Image]:
        given = {key: value[rows] if isinstance(value, list) else value for key, value in how.items()}
        images: list[Image.Image] = pipeline(
            prompt=PROMPTS[rows],
            height=SIZE.height,
            width=SIZE.width,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[rows]],
            callback_on_step_end=watch,
            **given,
            **edits(pipeline, rows),
        ).images
        return images

    if not isinstance(pipeline, QwenImageEditPlusPipeline):
        return drawn(slice(None)), seen
    images = [*drawn(slice(0, 1)), *drawn(slice(1, 2))]  # this pipeline takes one prompt
    return images, [torch.cat(pair) for pair in zip(seen[:steps], seen[steps:], strict=True)]


def edits(pipeline: Any, rows: slice = slice(None)) -> dict[str, Any]:
    """Return the arguments of a pipeline for the sources of these rows, if it edits."""
    if type(pipeline).__name__ not in EDITORS:
        return {}
    unscaled = {"max_area": SIZE.width * SIZE.height, "_auto_resize": False}
    return {"image": to_pil(SOURCES[rows]), **(unscaled if isinstance(pipeline, FluxKontextPipeline) else {})}


def as_seen(latents: Tensor, shape: torch.Size) -> Tensor:
    """A pipeline's latents as methods see them, by the packing that diffusers' FLUX pipelines have."""
    if latents.dim() == 4:
        return latents
    number, channels, height, width = shape
    if latents.shape[2] == channels:  # FLUX.2: a token is a pixel
        return latents.permute(0, 2, 1).reshape(shape)
    pixels = latents.view(number, height // 2, width // 2, channels, 2, 2)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images]).astype(int)
