"""Shared code of latent-diffusion families: autoencoder, sampling with diffusers' pipelines, loading, saving.

A denoiser is a UNet or a transformer; a pipeline has one of them, under that name.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmalign.attention import denoisers
from mmalign.attention.choice import SelectedBackend, install_backend, select_backend
from mmalign.config import ImageSize, SamplingConfig
from mmalign.diffusion.noise import Schedule
from mmalign.families import quantize, shapes
from mmalign.families.compile import denoiser_blocks
from mmalign.families.diffusion.adapter import load_trained, merge_adapter, read_adapter
from mmalign.families.diffusion.autoencoder import decode, encode
from mmalign.families.diffusion.export import export, save_pipeline
from mmalign.families.diffusion.offload import place, stages
from mmalign.families.diffusion.samplers import sampler
from mmalign.families.diffusion.single_file import load_single_file
from mmalign.families.diffusion.sizes import check_size, denoiser_name, resolution, size_multiple
from mmalign.families.editing import EDITORS, Editing, not_editing
from mmalign.families.lora import ATTENTION, adapter_layers, add_lora, all_linear, make_trainable, save_lora
from mmalign.families.types import Conditioning, Loading, LoraSettings, Moments, PromptInputs
from mmalign.policy.sharding import ShardPlan
from mmalign.reading.weights import every_tensor, intact, tensors_only, use_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
    from transformers import PreTrainedTokenizerBase

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # names in pipelines


@dataclass(frozen=True)
class LatentModel(ABC):
    """Base of the diffusion families: the parts of `TextToImage` that only need an autoencoder and a pipeline.

    A family adds its text encoding and its inputs: `encode_prompts` and `predict` for the network, `pipeline_kwargs`
    for the pipeline; and where they differ, `unconditional`, `count_truncated` and `default_lora_targets`.
    """

    default_lora_targets: ClassVar[Sequence[str]] = ATTENTION
    packing: ClassVar[None] = None

    name: str
    pipeline: DiffusionPipeline
    schedule: Schedule
    loading: Loading

    @property
    def network(self) -> ModelMixin:
        """The denoiser."""
        return getattr(self.pipeline, denoiser_name(self.pipeline))

    @property
    def resolution(self) -> int:
        """Side of an image in pixels: the denoiser's latent side times the autoencoder's reduction."""
        return resolution(self.pipeline)

    def sample(
        self,
        net: nn.Module,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        sources: Tensor | None = None,
    ) -> list[Image.Image]:
        size = ImageSize.parse(sampling.resolution or self.resolution)
        shape, encoders = self.latent_shape(size), dict(self.encoders())
        networks = [*encoders.values(), self.network, *([net] if net is not self.network else [])]
        # With offloading, only the networks of the present stage are on the device
        with stages(networks, self.loading.device if self.loading.offload else None) as stage:
            stage(*encoders.values())
            if sources is None:
                text = self.pipeline_kwargs(prompts, sampling)
            else:
                text = self.edit_kwargs(prompts, sampling, sources)
            attached = self.attached(net, sources)
            stage(encoders["vae"], net)
            with self.loading.autocast(), attached:
                sampled = self._sample_latents(net, text, seeds, sampling, size, shape)
            stage(encoders["vae"])
            return to_pil(self.decode(self.unpack(sampled, *shape[1:])))

    @torch.no_grad()
    def _sample_latents(
        self,
        net: nn.Module,
        text: dict[str, object],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        size: ImageSize,
        shape: tuple[int, int, int],
    ) -> Tensor:
        """Sample latents of this shape, as methods see it, with `net` as the denoiser; return the pipeline's layout.

        Raises:
            ValueError: the sampler's name is unknown, or it does not support the model.
        """
        pipeline = copy.copy(self.sampling_pipeline)  # leaves the family's denoiser and scheduler in place
        setattr(pipeline, denoiser_name(pipeline), net)
        # Encoders that have left the denoiser's device take no part, and would be taken for the pipeline's device
        device = next(net.parameters()).device
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and next(part.parameters()).device != device:
                setattr(pipeline, name, None)
        pipeline.scheduler = sampler(sampling.sampler, pipeline.scheduler)
        # The noise of an image follows from its seed; it is drawn on the CPU, whatever the device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents: Tensor = pipeline(
            height=size.height,
            width=size.width,
            num_inference_steps=sampling.steps,
            latents=self.pack(noise.to(device)),
            generator=generators,
            output_type="latent",
            **{name: tree_map_only(Tensor, lambda x: x.to(device), given) for name, given in text.items()},
        ).images
        return latents

    def attached(self, net: nn.Module, sources: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `net` gets sources that no argument passes on."""
        return contextlib.nullcontext()

    @property
    def sampling_pipeline(self) -> DiffusionPipeline:
        """The pipeline whose loop generates images."""
        return self.pipeline

    @property
    def editing(self) -> Editing | None:
        return EDITORS.get(type(self.pipeline).__name__)

    def encode_edits(self, prompts: Sequence[str], sources: Tensor) -> Conditioning:
        return self.encode_prompts(prompts)  # most text encoders do not see images

    def unconditional_edits(self, sources: Tensor) -> Conditioning:
        return self.unconditional().expand(len(sources))

    def edit_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig, sources: Tensor) -> dict[str, object]:
        """Return the pipeline's arguments for prompts with source images [N, 3, H, W] in [-1, 1].

        Raises:
            ValueError: the pipeline does not edit images.
        """
        raise ValueError(not_editing(self.name, type(self.pipeline).__name__))

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning, one row per prompt."""

    @abstractmethod
    def pipeline_kwargs(self, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, object]:
        """Return the pipeline's arguments for the prompts: embeddings and guidance scale, by the pipeline's names."""

    def unconditional(self) -> Conditioning:
        """Encode the empty prompt."""
        return self.encode_prompts([""])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated(self.pipeline.tokenizer, prompts)

    def pack(self, latents: Tensor) -> Tensor:
        """Convert latents [N, C, H, W] to the pipeline's layout."""
        return latents

    def unpack(self, sampled: Tensor, height: int, width: int) -> Tensor:
        """Convert the pipeline's output to latents [N, C, height, width]."""
        return sampled

    @property
    def size_multiple(self) -> int:
        """Number of pixels that an image's sides are multiples of."""
        return size_multiple(self.pipeline)

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents of images of this size.

        Raises:
            ValueError: the pipeline does not support that size.
        """
        check_size(self.pipeline, size)
        width, height = (side // self.pipeline.vae_scale_factor for side in size)
        return self.network.config.in_channels, height, width

    def encode_images(self, images: Tensor) -> Moments:
        """Return the posterior of images [N, 3, H, W] in [-1, 1].

        Raises:
            ValueError: the pipeline does not support the images' size.
        """
        check_size(self.pipeline, ImageSize(images.shape[-1], images.shape[-2]))
        return encode(self.pipeline.vae, images)

    def condition(self, text: Conditioning, sizes: Tensor) -> Conditioning:
        return text  # most families have no size conditioning

    def encoders(self) -> list[tuple[str, nn.Module]]:
        """Return the autoencoder and the checkpoint's text encoders, by name."""
        parts = self.pipeline.components
        return [(name, parts[name]) for name in ("vae", *TEXT_ENCODERS) if parts.get(name) is not None]

    def prompt_inputs(self) -> PromptInputs:
        """Return the pipeline's tokenizers, its processor and its settings."""
        parts = self.pipeline.components
        names = [name for name in parts if "tokenizer" in name or name == "processor"]
        settings = {name: value for name, value in self.pipeline.config.items() if name not in parts}
        return PromptInputs({name: parts[name] for name in names if parts[name] is not None}, settings)

    def place(self, *used: nn.Module) -> None:
        if self.loading.offload:
            place([self.network, *(net for _, net in self.encoders())], used, self.loading.device)

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.pipeline.vae, latents)

    @property
    def linear_layers(self) -> Sequence[str]:
        return all_linear(self.network)

    def add_lora(self, settings: LoraSettings) -> None:
        add_lora(self.network, settings)

    def continue_adapter(self, path: str) -> None:
        read_adapter(self.pipeline, self.network, path)
        make_trainable(self.network)

    def unfreeze(self) -> None:
        """Make all weights of the denoiser trainable."""
        self.network.requires_grad_(True)

    def frozen_copy(self) -> ModelMixin:
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """Return the blocks to compile: a UNet's transformer blocks, without its convolutions."""
        return denoiser_blocks(net)

    def shard_plan(self, net: nn.Module) -> ShardPlan:
        """Return the transformer blocks as shards; a UNet's convolutions are gathered for a whole pass."""
        return ShardPlan(denoiser_blocks(net))

    def use_attention(self, wanted: str) -> SelectedBackend:
        """Select and install the denoiser's attention backend; sdpa keeps diffusers' own code."""
        dtype = self.loading.half or torch.float32
        sizes = denoisers.head_sizes(self.network) if wanted != "sdpa" else frozenset()
        choice = select_backend(wanted, self.loading.device, dtype, sizes)
        return install_backend(wanted, choice, partial(denoisers.install, self.network))

    def save(self, folder: Path, net: nn.Module) -> None:
        """Save a folder that diffusers loads: LoRA weights if the network has adapters, else a whole pipeline."""
        if adapter_layers(net):
            save_lora(type(self.pipeline), denoiser_name(self.pipeline), net, folder)
        else:
            save_pipeline(self, net, folder)

    def export(self, folder: Path, net: nn.Module, form: str, dtype: torch.dtype | None) -> None:
        export(self, net, folder, form, dtype)

    def load_trained(self, folder: Path) -> ModelMixin:
        return load_trained(self.network, denoiser_name(self.pipeline), folder)


def load_pipeline(cls: type[DiffusionPipeline], path: str, loading: Loading) -> DiffusionPipeline:
    """Load a diffusers pipeline in eval mode, frozen, with a dtype for each part.

    Raises:
        ValueError: a file of the checkpoint is missing or cannot be read, or a single file is to be quantized.
    """
    part, reads_weights = denoiser_name(cls), not (loading.shapes_only or loading.tokenizers_only)
    # Parts that are replaced or left out, and dtypes
    options: dict[str, Any] = {"revision": loading.revision, "variant": loading.variant}
    if loading.vae and reads_weights:
        options["vae"] = _load_vae(loading.vae, loading)
    if "SafetyChecker" in str(cls.__init__.__annotations__):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    frozen = loading.half or torch.float32
    dtypes = {"default": frozen, part: frozen if loading.network_half else torch.float32, "vae": loading.vae_dtype}
    if not loading.shapes_only:
        options["use_safetensors"] = use_safetensors(path, loading.allow_pickle)
    with intact("model.path", path, f"a {cls.__name__}"), tensors_only(loading.allow_pickle), every_tensor():
        configured = loading.config or path
        index = cls.load_config(configured, revision=loading.revision)
        # Options of the parts: networks of shapes alone, or a quantized denoiser
        if loading.shapes_only:
            options |= shapes.build_pipeline_parts(configured, index, dtypes)
            if loading.quantize is not None:
                quantize.quantize_shapes(options[part], loading.quantize, "diffusers")
        elif loading.quantize is not None and not loading.tokenizers_only:
            options |= quantize.pipeline_options(loading.quantize, part, frozen, single_file=loading.config is not None)
        # Parts that the pipeline lacks, with the tokenizers of lacking encoders
        left_out = [name for name, kind in index.items() if isinstance(kind, list | tuple) and kind[0] is None]
        left_out += [name.replace("text_encoder", "tokenizer") for name in left_out if name in TEXT_ENCODERS]
        if loading.tokenizers_only:
            left_out += [part, "vae", *(name for name in TEXT_ENCODERS if name in index)]
        options = {**dict.fromkeys(left_out), **options}  # diffusers needs an explicit None, e.g. for SD3's T5
        # Weights, from one file or a folder, and an adapter that the run begins with
        if loading.config is not None and reads_weights:
            options["use_safetensors"] = use_safetensors(configured, loading.allow_pickle)
            pipeline = load_single_file(cls, part, path, loading.config, dtypes, options)
        else:
            pipeline = cls.from_pretrained(configured, dtype=dtypes, **options)
        pipeline.to("cpu" if loading.offload and not loading.shapes_only else loading.device)
    if loading.adapter is not None and reads_weights:
        merge_adapter(pipeline, pipeline.components[part], loading.adapter)
    if loading.quantize is not None and not loading.tokenizers_only:
        quantize.fit_for_training(pipeline.components[part], frozen)
    # All parts frozen; training unfreezes its own
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_vae(path: str, loading: Loading) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    with intact("model.vae", path, "an AutoencoderKL"), tensors_only(loading.allow_pickle):
        safe = use_safetensors(path, loading.allow_pickle)
        return AutoencoderKL.from_pretrained(path, dtype=loading.vae_dtype, use_safetensors=safe)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert [N, 3, H, W] in [-1, 1] to RGB images."""
    pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def pooled_and_not(cond: Conditioning, empty: Conditioning, sampling: SamplingConfig) -> dict[str, object]:
    """Return the arguments of pipelines that take token embeddings and a pooled embedding."""
    empty = empty.expand(len(cond))
    return {
        "prompt_embeds": cond.tensors["embeds"],
        "pooled_prompt_embeds": cond.tensors["pooled"],
        "negative_prompt_embeds": empty.tensors["embeds"],
        "negative_pooled_prompt_embeds": empty.tensors["pooled"],
        "guidance_scale": sampling.guidance,
    }


def count_truncated(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int | None = None) -> int:
    """Count prompts with more than `limit` tokens (default: the tokenizer's maximum)."""
    ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    return sum(len(row) > (limit or tokenizer.model_max_length) for row in ids)
