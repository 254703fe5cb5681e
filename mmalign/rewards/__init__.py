"""Judges: what says which of two images follows its prompt better. One file per judge; the file's name is its name.

A judge's file has a `Config` (a frozen pydantic model: the options a recipe may give) and
`load(path, device, cfg) -> RewardModel`. N is the number of images; higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from mmalign import registry


class RewardModel(Protocol):
    """Scores images, each against the prompt of the same row. Only a judge that knows noisy images reads `t`.

    Without `t` images are taken for clean.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores [N], float32, without a graph; rows do not depend on each other. `t`: timesteps [N]."""
        ...


class RewardModule(Protocol):
    """What a file of this folder offers."""

    @property
    def Config(self) -> type[BaseModel]:
        """The options, frozen and without extra keys."""
        ...

    def load(self, path: str, device: torch.device, cfg: BaseModel) -> RewardModel:
        """The judge, on the device."""
        ...


def names() -> list[str]:
    """The judges there are: the files of this folder."""
    return registry.names(__name__)


def reward_module(name: str) -> RewardModule:
    """The module of a judge; importing it loads no heavy library.

    Raises:
        ValueError: no file has this name.
    """
    return cast(RewardModule, registry.find([__name__], name, "judge: there is no"))


def load_reward_model(name: str, path: str, device: torch.device | str = "cpu", **options: object) -> RewardModel:
    """The judge of a name, with the weights at `path`, guarded by `checked`. `options` are the fields of its `Config`.

    Raises:
        ValueError: an unknown judge or option, or weights that are missing or do not fit.
    """
    module = reward_module(name)
    try:
        cfg = module.Config(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(module.Config.model_fields)
        raise ValueError(
            f"judge {name}: {key}: {first['msg'].lower()}, got {first['input']!r}; options: {known}"
        ) from None
    return checked_reward_model(name, module.load(path, torch.device(device), cfg))


def checked_reward_model(name: str, reward_model: RewardModel) -> RewardModel:
    """The same judge, which refuses to go on with scores that no pair may be made of.

    Raises:
        ValueError: (when called) images and prompts differ in number, or scores are not float32 [N], or not all finite.
    """

    def call(images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(
                f"judge {name}: {len(images)} images and {len(prompts)} prompts; give one prompt for each image"
            )
        scores = reward_model(images, prompts, t)
        if scores.shape != (len(images),) or scores.dtype != torch.float32:
            raise ValueError(
                f"judge {name}: scores of shape {list(scores.shape)} and {scores.dtype} for {len(images)} images;"
                f" expected [{len(images)}] and torch.float32: mend mmalign/rewards/{name}.py"
            )
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            rows = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise ValueError(
                f"judge {name}: {len(bad)} of {len(images)} scores are not finite (rows {rows}; the first prompt is"
                f" {prompts[bad[0]][:80]!r}); look at these images, and at the judge's weights if all rows are listed"
            )
        return scores

    return call
