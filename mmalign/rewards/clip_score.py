"""CLIPScore (arXiv:2104.08718): 2.5 max(cosine, 0) of the image and "A photo depicts PROMPT", by CLIP ViT-B/32.

`path` names a CLIPModel of transformers; the paper's is openai/clip-vit-base-patch32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.rewards import BatchConfig as Config
from mmalign.rewards import check_files, transformers_clip
from mmalign.rewards.open_clip import OpenClip, scorer

check = check_files
WEIGHT, PREFIX = 2.5, "A photo depicts "


def load(path: str, device: torch.device, cfg: Config) -> OpenClip:
    """Load a CLIPModel from a folder or the Hub.

    Raises:
        ValueError: there is no such model, its weights are missing, or it is not a CLIP.
    """
    return scorer(transformers_clip.load_parts(path), device, cfg.batch_size, _score, PREFIX)


def _score(cosines: Tensor, scale: Tensor) -> Tensor:
    return WEIGHT * cosines.clamp(min=0)
