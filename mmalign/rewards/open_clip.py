"""Any open_clip model as a judge: the cosine of image and prompt times the learned scale, as CLIPScore and PickScore.

Prompts that are longer than the text tower's context are cut by the tokenizer, as in CLIP's training. A model's logit
bias (SigLIP) is left out: it is the same for every pair. N is the number of images, E the width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from mmalign.resources import resolve_model

KNOWN = 8192  # prompts whose features are kept


class Config(BaseModel):
    """Options of the judge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pretrained: str | None = None
    """Where `path` is an architecture of open_clip (`ViT-B-32`): the tag or the file of its weights."""
    batch_size: PositiveInt = 64
    """Images that go through the network at once."""


@dataclass(frozen=True)
class TextFeatures:
    """Unit vectors of prompts, each encoded once, and alone: in a batch its last digits would depend on its company.

    Attributes:
        model: an open_clip model.
        tokenize: from prompts to [N, context].
        device: of the model.
    """

    model: Any  # open_clip has no types: CLIP, CustomTextCLIP or CoCa
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    _known: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[N, E], float32."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                vector = self.model.encode_text(self.tokenize([prompt]).to(self.device), normalize=True)[0].float()
                self._known[prompt] = vector
        features = torch.stack([self._known[prompt] for prompt in prompts])
        for oldest in list(self._known)[: max(0, len(self._known) - KNOWN)]:
            del self._known[oldest]
        return features


@dataclass(frozen=True)
class OpenClip:
    """A loaded model, in float32 and eval mode."""

    model: Any
    preprocess: Callable[[Image.Image], Tensor]  # to [3, H, W]
    text: TextFeatures
    device: torch.device
    batch_size: int

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores [N], float32, on the device of the model; `t` is not read."""
        parts = [torch.empty(0, device=self.device)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self._score(images[rows], prompts[rows]))
        return torch.cat(parts)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [N, E] of images, all at once; a cosine of two says how alike they are."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        features: Tensor = self.model.encode_image(pixels, normalize=True)
        return features.float()

    @torch.no_grad()
    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        scale: Tensor = self.model.logit_scale.exp()
        return (scale * (self.embed(images) * self.text(prompts)).sum(-1)).float()


def load(path: str, device: torch.device, cfg: Config) -> OpenClip:
    """The model in a folder (config, weights and tokenizer as open_clip saves them), on the Hub, or of a known name.

    Raises:
        ValueError: there is no such model, or its weights are missing or do not fit its config.
    """
    model, preprocess, tokenize = load_parts(path, cfg.pretrained)
    model = model.eval().requires_grad_(False).to(device)
    return OpenClip(model, preprocess, TextFeatures(model, tokenize, device), device, cfg.batch_size)


def load_parts(path: str, pretrained: str | None = None) -> tuple[Any, Callable[[Image.Image], Tensor], Any]:
    """A model on the CPU, in float32, with its image preprocessing and its tokenizer.

    Raises:
        ValueError: there is no such model, or its weights are missing or do not fit its config.
    """
    import open_clip

    try:
        name = _open_clip_name(path, pretrained)
        # Not `create_model`: that one goes on with random weights where it finds none.
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, precision="fp32")
        tokenize = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"judge open_clip: cannot load {path!r} ({' '.join(str(error).split())[:300]}); expected a folder with"
            " open_clip_config.json, weights and tokenizer, a Hub id of such a folder, or an architecture of open_clip"
            " with `pretrained`"
        ) from error
    return model, preprocess, tokenize


def _open_clip_name(path: str, pretrained: str | None) -> str:
    """The name as open_clip wants it: with a schema for folders and Hub ids, bare for its own architectures."""
    bare = path.removeprefix("hf-hub:").removeprefix("local-dir:")
    if pretrained is not None:
        return bare  # a folder or Hub id is refused under this name, and it should be: it brings its own weights
    resolved = resolve_model(bare)
    return f"local-dir:{resolved}" if Path(resolved).exists() else f"hf-hub:{resolved}"
