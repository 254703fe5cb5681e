"""Step-aware reward model in training, with the frozen text-to-image model that makes its noisy images.

The trained network is the reward model's (`mmalign.rewards.step_aware`). The frozen model encodes images and prompts,
predicts clean images from noisy ones, and decodes them.

N is the number of images, S their side at the reward model's resolution, L the tokens of a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmalign.attention.choice import SelectedBackend
from mmalign.families.base import TextToImage
from mmalign.families.diffusion.pipeline import to_pil
from mmalign.families.types import Loading, LoraSettings
from mmalign.policy.sharding import ShardPlan
from mmalign.reading.weights import tensors_only
from mmalign.rewards import step_aware
from mmalign.rewards.step_aware import Parts, TimeConditioned

NOT_COMPILED = "train.compile: not supported for step judges, whose steps mostly run frozen networks; leave it out"
NOT_SHARDED = "train.sharding: not supported for step judges, which fit on one device; leave it out"


@dataclass(frozen=True)
class StepJudge:
    """Adapter of a step-aware reward model to the protocol Family.

    Attributes:
        name: the path or Hub id that the reward model was loaded from.
        parts: the reward model.
        denoiser: the frozen text-to-image model.
        loading: the device of the reward model's network, and the dtype of its autocast.
    """

    default_lora_targets: ClassVar[Sequence[str]] = ()  # a reward model is trained in full
    linear_layers: ClassVar[Sequence[str]] = ()
    packing: ClassVar[None] = None

    name: str
    parts: Parts
    denoiser: TextToImage
    loading: Loading

    @property
    def network(self) -> nn.Module:
        """The reward model's network: both towers, and the layers that condition the vision tower on the timestep."""
        return self.parts.net

    def add_lora(self, settings: LoraSettings) -> None:
        """Refuse adapters: the layers for the timestep are initialized to zeros, so they need full training."""
        raise ValueError("model.tune: a step judge needs all its weights trained; set model.tune: full")

    def continue_adapter(self, path: str) -> None:
        """Refuse adapters: a step judge is trained in full."""
        raise ValueError("model.adapter: a step judge needs all its weights trained; leave it out")

    def unfreeze(self) -> None:
        """Unfreeze all of the reward model."""
        self.network.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of the vision tower, which has nearly all of them."""
        self.parts.net.checkpointing = True

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """Refuse compilation: the frozen model, which makes the images, does most of the work."""
        raise ValueError(NOT_COMPILED)

    def shard_plan(self, net: nn.Module) -> ShardPlan:
        """Refuse sharding: the network is small, and its temperature is a scalar."""
        raise ValueError(NOT_SHARDED)

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Set the frozen model's attention, which is most of the work; the reward model's own attention is fixed."""
        return self.denoiser.use_attention(wanted)

    def save(self, folder: Path, net: nn.Module) -> None:
        """Write a folder that the reward model `step_aware` loads."""
        assert isinstance(net, TimeConditioned)
        step_aware.save(replace(self.parts, net=net), folder)

    def export(self, folder: Path, net: nn.Module, form: str, dtype: torch.dtype | None) -> None:
        """Refuse other forms: only mmalign reads step-aware reward models."""
        raise ValueError("only mmalign reads a step judge; name the folder `model` of the run as a reward model's path")

    def load_trained(self, folder: Path) -> nn.Module:
        with tensors_only():
            return step_aware.read(str(folder)).net.requires_grad_(False).eval().to(self.loading.device)

    def pixels(self, images: Tensor) -> Tensor:
        """Clip and preprocess images [N, 3, H, W] in [-1, 1] for the reward model: [N, 3, S, S]."""
        return torch.stack([self.parts.preprocess(image) for image in to_pil(images)]).to(self.loading.device)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize prompts [N] for the reward model: [N, L]."""
        ids: Tensor = self.parts.tokenize(list(prompts))
        return ids.to(self.loading.device)

    def score(self, net: nn.Module, pixels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        """Return the scores [N], float32; tokens are passed once for all images of a prompt (see TimeConditioned)."""
        with self.loading.autocast():
            scores: Tensor = net(pixels, ids, t)
        return scores.float()


def load(path: str, denoiser: TextToImage, loading: Loading) -> StepJudge:
    """Load a reward model to train: a step-aware one, or a CLIP of open_clip or transformers as the initial model.

    Raises:
        ValueError: the path has neither, or its vision tower cannot be conditioned on the timestep.
    """
    with tensors_only(loading.allow_pickle):
        parts = step_aware.begin(path)
    parts.net.requires_grad_(False).eval().to(loading.device)
    return StepJudge(path, parts, denoiser, loading)
