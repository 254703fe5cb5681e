"""HPS v2 and v2.1 (arXiv:2306.09341): the cosine of image and prompt by a fine-tuned CLIP ViT-H/14.

`path` is the authors' repository xswu/HPSv2 or a folder with their file. It is a pickle, which `allow_pickle` reads for
tensors alone. As in the release, images are resized as tensors, to a longer side of 224, and padded with black.
torchvision resizes with antialiasing, which its older versions did not.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from mmalign.rewards import BatchConfig, check_files
from mmalign.rewards._weights import check_shapes, find_file, read_tensors
from mmalign.rewards.open_clip import ClipParts, OpenClip, quiet, scorer

check = check_files
REMEDY = "expected the file of an HPSv2 model, and options.architecture with open_clip's name of its network"


class Config(BatchConfig):
    """Options of the reward model."""

    weights: str = "HPS_v2.1_compressed.pt"
    """File of the weights; version 2.0 is HPS_v2_compressed.pt."""
    architecture: str = "ViT-H-14"
    """open_clip's name of the network."""


def load(path: str, device: torch.device, cfg: Config) -> OpenClip:
    """Load the published weights.

    Raises:
        ValueError: there is no such file, it is a pickle that the recipe does not allow, or it does not fit.
    """
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    if cfg.architecture not in open_clip.list_models():
        raise ValueError(f"reward hps: architecture: open_clip has no {cfg.architecture!r}; use ViT-H-14")
    file = find_file("hps", path, cfg.weights)
    weights = {name: x.float() for name, x in read_tensors("hps", file, "visual.", inner="state_dict").items()}
    with quiet():
        model = open_clip.create_model(cfg.architecture, load_weights=False)
    check_shapes("hps", file, weights, {name: x.shape for name, x in model.state_dict().items()}, REMEDY)
    model.load_state_dict(weights)
    size = model.visual.image_size[0]

    def preprocess(image: Image.Image) -> Tensor:
        pixels = transforms.to_tensor(image.convert("RGB"))
        scale = size / max(pixels.shape[1:])
        height, width = (round(side * scale) for side in pixels.shape[1:])
        resized = transforms.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        # Centered on black; an odd pixel goes to the right and to the bottom
        top, left = (size - height) // 2, (size - width) // 2
        padded = transforms.pad(resized, [left, top, size - width - left, size - height - top])
        normalized: Tensor = transforms.normalize(padded, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        return normalized

    parts = ClipParts(model, preprocess, open_clip.get_tokenizer(cfg.architecture), {})
    return scorer(parts, device, cfg.batch_size, _score)


def _score(cosines: Tensor, scale: Tensor) -> Tensor:
    return cosines
