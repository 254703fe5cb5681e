"""A judge that learns to know noisy images, with the frozen text-to-image model that shows it some.

The network is the judge's (`mmalign.rewards.step_aware`); the other model encodes images and prompts, predicts clean
images from noisy ones, and decodes them. N images, S their side in the judge's eyes, L tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.attention.choice import SelectedBackend
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.types import Loading
from mmalign.rewards import step_aware
from mmalign.rewards.step_aware import Parts, TimeConditioned

NOT_COMPILED = "train.compile: compiles what is trained, and most of a judge's step is not; leave it out"


@dataclass(frozen=True)
class StepJudge:
    """Makes a step-aware judge answer the calls of the protocol Family, which say what each does.

    Attributes:
        name: where the judge came from.
        parts: the judge.
        denoiser: the frozen text-to-image model.
        loading: where the judge's network is, and the dtype of its autocast.
    """

    name: str
    parts: Parts
    denoiser: TextToImage
    loading: Loading

    @property
    def network(self) -> nn.Module:
        """The judge's network: both towers, and what tells the vision tower the time."""
        return self.parts.net

    @property
    def default_lora_targets(self) -> Sequence[str]:
        """None: a judge is trained whole."""
        return ()

    def add_lora(self, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """See Family.

        Raises:
            ValueError: always; what tells the time begins as zeros, and has to be trained whole.
        """
        raise ValueError("model.tune: a step-aware judge is trained whole; set model.tune: full")

    def unfreeze(self) -> None:
        """All of the judge."""
        self.network.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """See Family."""
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        """Of the vision tower, in which nearly all of them are."""
        self.parts.net.checkpointing = True

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """See Family.

        Raises:
            ValueError: always; most of the work is the frozen model's, which makes the judge's images.
        """
        raise ValueError(NOT_COMPILED)

    def use_attention(self, wanted: str) -> SelectedBackend:
        """See Family. The frozen model's, which is most of the work; a judge computes its attention by itself."""
        return self.denoiser.use_attention(wanted)

    def save(self, folder: Path, net: nn.Module) -> None:
        """A folder that the judge `step_aware` loads."""
        assert isinstance(net, TimeConditioned)
        step_aware.save(replace(self.parts, net=net), folder)

    def load_trained(self, folder: Path) -> nn.Module:
        """See Family."""
        return step_aware.read(str(folder)).net.requires_grad_(False).eval().to(self.loading.device)

    def pixels(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], clipped, as the judge sees them: [N, 3, S, S]."""
        return torch.stack([self.parts.preprocess(image) for image in to_pil(images)]).to(self.loading.device)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts [N] as the judge reads them: [N, L]."""
        ids: Tensor = self.parts.tokenize(list(prompts))
        return ids.to(self.loading.device)

    def score(self, net: nn.Module, pixels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        """The scores [N], float32; tokens are given once for all images of a prompt (see TimeConditioned)."""
        half = self.loading.half
        cast = torch.autocast(self.loading.device.type, half) if half is not None else contextlib.nullcontext()
        with cast:
            scores: Tensor = net(pixels, ids, t)
        return scores.float()


def load(path: str, denoiser: TextToImage, loading: Loading) -> StepJudge:
    """A judge to train: a step-aware one to go on with, or a CLIP of open_clip or transformers, as which it begins.

    Raises:
        ValueError: it is neither, or its vision tower cannot be told the time.
    """
    parts = step_aware.begin(path)
    parts.net.requires_grad_(False).eval().to(loading.device)
    return StepJudge(path, parts, denoiser, loading)
