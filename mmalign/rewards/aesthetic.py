"""LAION's improved aesthetic predictor: linear layers on the unit image vector of CLIP ViT-L/14, without the prompt.

`path` is a repository or folder with the file of the layers, such as trl-lib/ddpo-aesthetic-predictor. It is a pickle,
which `allow_pickle` reads for tensors alone. Scores are ratings from 1 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.rewards import BatchConfig, check_files, in_batches, transformers_clip
from mmalign.rewards._weights import check_shapes, find_file, read_tensors
from mmalign.rewards.open_clip import OpenClip, scorer

check = check_files
REMEDY = "expected the layers of the aesthetic predictor, and options.clip with the CLIP that it was trained on"


class Config(BatchConfig):
    """Options of the reward model."""

    weights: str = "aesthetic-model.pth"
    """File of the layers; the authors' own is sac+logos+ava1-l14-linearMSE.pth."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIPModel of transformers that embeds the images."""


@dataclass(frozen=True)
class Aesthetic:
    """Loaded reward model, in float32 and eval mode."""

    clip: OpenClip
    head: nn.Module

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CLIP's device; `prompts` and `t` are not read."""
        clip = self.clip
        return in_batches(
            lambda rows: self.head(clip.embed(images[rows]))[:, 0], len(images), clip.batch_size, clip.device
        )


def regression_head(width: int) -> nn.Module:
    """Return the predictor's layers, from vectors [N, width] to [N, 1]; without activations, as published."""
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.Sequential(*layers)


def load(path: str, device: torch.device, cfg: Config) -> Aesthetic:
    """Load the layers and the CLIP.

    Raises:
        ValueError: a file or model is missing, is a pickle that the recipe does not allow, or does not fit.
    """
    file = find_file("aesthetic", path, cfg.weights)
    weights = {name: x.float() for name, x in read_tensors("aesthetic", file, "layers.").items()}
    clip = scorer(transformers_clip.load_parts(cfg.clip), device, cfg.batch_size)
    head = regression_head(int(clip.model.visual.output_dim))
    expected = {f"layers.{name}": x.shape for name, x in head.state_dict().items()}
    check_shapes("aesthetic", file, weights, expected, REMEDY)
    head.load_state_dict({name.removeprefix("layers."): x for name, x in weights.items()})
    return Aesthetic(clip, head.eval().requires_grad_(False).to(device))
