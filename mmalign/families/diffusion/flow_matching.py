"""Shared code of flow-matching families: packed latents, padded text, default LoRA targets.

Methods see latents [N, C, H, W]; the transformers take one token per 2 x 2 patch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.config import ImageSize
from mmalign.diffusion.flow import Flow
from mmalign.families.diffusion.pipeline import LatentModel, load_pipeline
from mmalign.families.diffusion.sizes import resolution
from mmalign.families.editing import SOURCE
from mmalign.families.lora import ATTENTION
from mmalign.families.types import Conditioning, Loading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.configuration_utils import FrozenDict

M = TypeVar("M", bound=LatentModel)

STEPS = 50  # the pipelines' usual default; FLUX.2's shift depends slightly on it
# Attention projections of images and text, as in the LoRA scripts of diffusers and Flow-GRPO.
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def load(
    family: type[M],
    kind: type[DiffusionPipeline],
    path: str,
    loading: Loading,
    *,
    side: int | None = None,
    mu: Callable[[int, int], float] | None = None,
    even: bool = True,
) -> M:
    """Load a folder or Hub id with a flow-matching pipeline; times are shifted as for the size of training images.

    Args:
        family: the adapter.
        kind: the pipeline's class.
        path: the folder or the Hub id.
        loading: the settings.
        side: the side of the model's images in pixels; None for a pipeline that knows it.
        mu: the shift in logits by an image's tokens and the sampler's steps; None for a line in the tokens, as in
            most pipelines.
        even: True if the pipeline gives its scheduler even times from 1 to 1 / steps; otherwise the scheduler's own.

    Raises:
        ValueError: the scheduler is not a flow-matching one.
    """
    pipeline = load_pipeline(kind, path, loading)
    scheduler, size = pipeline.scheduler, loading.size or [side or resolution(pipeline)] * 2
    width, height = (length // pipeline.vae_scale_factor // 2 for length in size)
    of_steps = partial(mu or partial(linear_mu, scheduler.config), width * height)
    times = partial(scheduler_times, copy.deepcopy(scheduler), of_steps, even)
    return family(path, pipeline, Flow.from_scheduler(scheduler, of_steps(STEPS), times, path), loading)


def linear_mu(config: FrozenDict, tokens: int, steps: int) -> float:
    """Return the shift in logits, linear in the number of an image's tokens; 0 for schedulers with a fixed shift."""
    if not config.get("use_dynamic_shifting"):
        return 0.0
    few, many = config.base_image_seq_len, config.max_image_seq_len
    return float(config.base_shift + (config.max_shift - config.base_shift) / (many - few) * (tokens - few))


def scheduler_times(scheduler: SchedulerMixin, mu: Callable[[int], float], even: bool, steps: int) -> Tensor:
    """Return the times [S + 1] at which a pipeline calls its network, and 0; the first is exactly 1."""
    given: dict[str, Any] = {"num_inference_steps": steps}
    if even:
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = mu(steps)
    scheduler.set_timesteps(**given)
    times: Tensor = scheduler.sigmas.clone()
    times[0] = 1  # pure noise, which rounding misses with some shifts
    return times


def pack(latents: Tensor) -> Tensor:
    """Convert latents [N, C, H, W] to tokens [N, H/2 * W/2, 4C], row by row."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Convert tokens back to latents [N, C, height, width]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2), 2)


def images(x_t: Tensor, cond: Conditioning) -> list[Tensor]:
    """Return the images whose tokens a network gets, one after the other: x_t, and the source image if there is one."""
    return [x_t, cond.tensors[SOURCE]] if SOURCE in cond.tensors else [x_t]


@contextlib.contextmanager
def attached(net: nn.Module, tokens: Tensor, **more: Any) -> Iterator[None]:
    """Append `tokens` [N, L, C] to those that a network gets, and drop its predictions of them.

    Args:
        net: the network, which a pipeline calls by keywords.
        tokens: the tokens of source images.
        more: further arguments of every call.
    """

    def before(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = given["hidden_states"]
        return args, {**given, **more, "hidden_states": torch.cat([own, tokens.to(own)], 1)}

    def after(_: nn.Module, __: object, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (out[0][:, : -tokens.shape[1]], *out[1:])

    # The pipeline calls the network itself, so its inputs are reached by hooks
    hooks = net.register_forward_pre_hook(before, with_kwargs=True), net.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class PackedModel(LatentModel):
    """A model whose pipeline samples tokens, one per 2 x 2 patch of its latents."""

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """Return a latent's shape; the network's channels are those of a 2 x 2 patch."""
        packed, height, width = super().latent_shape(size)
        return packed // 4, height, width

    def pack(self, latents: Tensor) -> Tensor:
        """Convert latents to the pipeline's tokens."""
        return pack(latents)

    def unpack(self, sampled: Tensor, height: int, width: int) -> Tensor:
        """Convert the pipeline's tokens to latents."""
        return unpack(sampled, height, width)


def padded(rows: Sequence[Tensor], length: int) -> Conditioning:
    """Pad the embeddings [L, D] of texts, L <= `length`, to `embeds` [N, length, D] with `mask` [N, length].

    The mask is 1 for text and 0 for padding; float32, as caches return all tensors.
    """
    embeds = torch.stack([F.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(length, device=embeds.device) < lengths[:, None]
    return Conditioning({"embeds": embeds, "mask": mask.float()})


def texts(cond: Conditioning) -> list[Tensor]:
    """Return the unpadded embeddings [L, D], the inverse of `padded`."""
    lengths = cond.tensors["mask"].sum(1).int().tolist()
    return [row[:length] for row, length in zip(cond.tensors["embeds"], lengths, strict=True)]
