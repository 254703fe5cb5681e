"""Weights and preprocessing of the step-aware reward models that SPO's authors published (arXiv:2406.04314).

A file has the weights of a CLIPModel of transformers and of the layers that condition it on the timestep:

    t_embedder.mlp.{0,2}                                    the MLP of the timestep
    vision_model.encoder.layers.N.adaLN_modulation.1        shifts, scales and gates of block N
    vision_model.adaLN_modulation.1                         shift and scale of the class token

All names may begin with `model.`. Files of old versions of transformers also hold `position_ids`: 0, 1, 2, ...

The release resizes images to a shorter side S by bicubic interpolation without antialiasing, and crops the center.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmalign.rewards._weights import check_shapes, find_file, read_tensors
from mmalign.rewards.transformers_clip import renamed

if TYPE_CHECKING:
    from transformers import CLIPConfig

PREFIX = "model."
REMEDY = (
    "expected the file of an SPO step-aware preference model, and options.clip with the CLIP that it was trained from"
)
NAMES = (  # a pattern of the release's names, and its replacement in those of `TimeConditioned`
    (r"^t_embedder\.mlp\.", "time."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1."),
    (r"^vision_model\.adaLN_modulation\.1\.", "final."),
)


def read_weights(path: str, name: str, config: CLIPConfig, frequencies: int) -> dict[str, Tensor]:
    """Read a published file of a folder or Hub repository as weights of `TimeConditioned`, in float32.

    The file is `.safetensors` or a pickle of tensors; `frequencies` is the width of the timestep's sinusoid.

    Raises:
        ValueError: there is no such file, it is not a file of tensors, or their names or shapes do not fit the config.
    """
    file = find_file("step_aware", path, name)
    weights = read_tensors("step_aware", file, PREFIX)
    # Names may begin with a prefix; the positions of old files are no weights
    if weights and all(key.startswith(PREFIX) for key in weights):
        weights = {key.removeprefix(PREFIX): weight for key, weight in weights.items()}
    positions = [key for key in weights if key.endswith(".position_ids")]
    for key in positions:
        if not torch.equal(weights[key].flatten(), torch.arange(weights[key].numel())):
            raise ValueError(f"reward step_aware: {file}: {key} is not 0, 1, 2, ...; no other order is supported")
    weights = {key: weight.float() for key, weight in weights.items() if key not in positions}
    check_shapes("step_aware", file, weights, expected_shapes(config, frequencies), REMEDY)
    # Layers of the timestep, and the CLIP by open_clip's names
    conditioning = {new: weight for key, weight in weights.items() if (new := _conditioning_name(key))}
    clip = renamed({key: weight for key, weight in weights.items() if not _conditioning_name(key)})
    return {**{f"clip.{key}": weight for key, weight in clip.items()}, **conditioning}


def expected_shapes(config: CLIPConfig, frequencies: int) -> dict[str, torch.Size]:
    """Return the shape of every weight of a published file, by its name without the prefix."""
    from transformers import CLIPModel

    # Names and shapes of the CLIP, at no cost of memory
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CLIPModel(config).state_dict().items()}
    width, layers = config.vision_config.hidden_size, config.vision_config.num_hidden_layers
    # The timestep's layers, as the module docstring lists them
    linears = {"t_embedder.mlp.0": (width, frequencies), "t_embedder.mlp.2": (width, width)}
    linears |= {f"vision_model.encoder.layers.{i}.adaLN_modulation.1": (6 * width, width) for i in range(layers)}
    linears["vision_model.adaLN_modulation.1"] = (2 * width, width)
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": torch.Size([rows, columns]), f"{name}.bias": torch.Size([rows])}
    return shapes


def preprocessing(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    """Return the release's preprocessing, from an image to [3, size, size]."""
    from torchvision.transforms import functional as transforms

    def preprocess(image: Image.Image) -> Tensor:
        pixels: Tensor = transforms.to_tensor(image.convert("RGB"))
        # The shorter side to `size`, halves rounded up
        scale = size / min(pixels.shape[1:])
        sides = [math.floor(side * scale + 0.5) for side in pixels.shape[1:]]
        resized = F.interpolate(pixels[None], sides, mode="bicubic", align_corners=False)[0]
        cropped = transforms.center_crop(resized.clamp(0, 1), [size, size])
        normalized: Tensor = transforms.normalize(cropped, list(mean), list(std))
        return normalized

    return preprocess


def _conditioning_name(name: str) -> str | None:
    """Return the name in `TimeConditioned` of a weight that reads the timestep; None for those of the CLIP."""
    return next((re.sub(pattern, by, name) for pattern, by in NAMES if re.match(pattern, name)), None)
