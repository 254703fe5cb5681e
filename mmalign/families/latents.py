"""What the latent-diffusion families share: the autoencoder, sampling by diffusers' pipelines, loading, saving."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.diffusion.noise import Schedule
from mmalign.families import Conditioning, Loading, Moments, Sampling
from mmalign.families.checkpoints import intact
from mmalign.families.lora import ATTENTION, add_lora

SAMPLERS = ("default", "ddim", "dpmsolver++")
ADAPTERS = "pytorch_lora_weights.safetensors"  # as diffusers calls the file


@dataclass(frozen=True)
class LatentUNet:
    """What a pipeline with a UNet and an autoencoder does whatever its text is; TextToImage says what each call does.

    A family adds how its text is encoded and given to the network: `encode_prompts`, `unconditional`, `condition`,
    `predict`, `sample`, `encoders`.
    """

    name: str
    pipeline: Any
    schedule: Schedule
    loading: Loading

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return self.pipeline.unet  # type: ignore[no-any-return]

    @property
    def resolution(self) -> int:
        """Pixels; the UNet's sample size times the autoencoder's reduction."""
        return int(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)

    def encode_images(self, images: Tensor) -> Moments:
        """See TextToImage."""
        return encode(self.pipeline.vae, images)

    def count_cut(self, prompts: Sequence[str]) -> int:
        """See TextToImage."""
        return count_cut(self.pipeline.tokenizer, prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """See TextToImage."""
        return decode(self.pipeline.vae, latents)

    @property
    def usual_targets(self) -> Sequence[str]:
        """The attention's projections."""
        return ATTENTION

    def add_lora(self, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """See Family."""
        add_lora(self.network, rank=rank, alpha=alpha, targets=targets, seed=seed)

    def unfreeze(self) -> None:
        """All of the UNet."""
        self.network.requires_grad_(True)

    def frozen_copy(self) -> nn.Module:
        """See Family."""
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    def checkpoint_activations(self) -> None:
        """See Family."""
        self.pipeline.unet.enable_gradient_checkpointing()

    def save(self, folder: Path, net: nn.Module) -> None:
        """As diffusers loads it: LoRA weights where the network has adapters, else a whole pipeline folder."""
        save(self.pipeline, folder, net)

    def load_trained(self, folder: Path) -> nn.Module:
        """See Family."""
        return load_trained(self.pipeline.unet, folder)


def load_pipeline(cls: Any, path: str, loading: Loading) -> Any:
    """A diffusers pipeline, every part in its dtype, frozen, and in eval mode.

    Raises:
        ValueError: a file of the checkpoint is missing or cannot be read.
    """
    options: dict[str, Any] = {"revision": loading.revision}
    if loading.vae:
        options["vae"] = _load_vae(loading.vae, loading.vae_dtype)
    if "SafetyChecker" in str(cls.__init__.__annotations__):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    frozen = loading.half or torch.float32
    dtypes = {
        "default": frozen,
        "unet": frozen if loading.network_half else torch.float32,
        "vae": loading.vae_dtype,
    }
    with intact("model.path", path, f"a {cls.__name__}"):
        pipeline = cls.from_pretrained(path, dtype=dtypes, **options).to(loading.device)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_vae(path: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    with intact("model.vae", path, "an AutoencoderKL"):
        return AutoencoderKL.from_pretrained(path, dtype=dtype)


def autocast(loading: Loading) -> contextlib.AbstractContextManager[Any]:
    """Autocast to the half precision in use, or nothing."""
    if loading.half is None:
        return contextlib.nullcontext()
    return torch.autocast(loading.device.type, loading.half)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Moments:
    """The posterior of images [N, 3, H, W] in [-1, 1], in the denoiser's scale."""
    with _own_dtype(vae):
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    scale, shift = _scale_and_shift(vae)
    return Moments((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] of latents in the denoiser's scale, float32."""
    scale, shift = _scale_and_shift(vae)
    with _own_dtype(vae):
        return vae.decode((latents.float() / scale + shift).to(vae.device, vae.dtype)).sample.float()  # type: ignore[no-any-return]


def _own_dtype(vae: Any) -> contextlib.AbstractContextManager[Any]:
    """No autocast: SDXL's own autoencoder overflows in float16, whatever the denoiser runs in."""
    return torch.autocast(vae.device.type, enabled=False)


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB images of [N, 3, H, W] in [-1, 1]."""
    pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


@torch.no_grad()
def sample(
    pipeline: Any, net: nn.Module, text: dict[str, Tensor], seeds: Sequence[int], sampling: Sampling, resolution: int
) -> list[Image.Image]:
    """Images drawn by a diffusers pipeline with `net` in it; `text` are the pipeline's own embedding arguments."""
    pipeline = copy.copy(pipeline)  # so that the denoiser and the sampler of the family stay what they are
    pipeline.unet, pipeline.scheduler = net, sampler(sampling.sampler, pipeline.scheduler)
    side = sampling.resolution or resolution
    config: Any = net.config
    shape = (config.in_channels, side // pipeline.vae_scale_factor, side // pipeline.vae_scale_factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # go on with what the sampler adds on the way
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = pipeline(
        height=side,
        width=side,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        latents=noise.to(pipeline.device),
        generator=generators,
        output_type="latent",
        **text,
    ).images
    return to_pil(decode(pipeline.vae, latents))


def sampler(name: str, own: Any) -> Any:
    """A diffusers scheduler by name, with the noise schedule of the checkpoint's `own`.

    Raises:
        ValueError: no sampler has that name.
    """
    import diffusers

    classes = {
        "default": type(own),
        "ddim": diffusers.DDIMScheduler,
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    }
    if name not in classes:
        raise ValueError(f"sampler: {name!r} is unknown; expected one of {', '.join(SAMPLERS)}")
    return classes[name].from_config(own.config)


def count_cut(tokenizer: Any, prompts: Sequence[str]) -> int:
    """How many prompts have more tokens than the text encoder reads."""
    ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    return sum(len(row) > tokenizer.model_max_length for row in ids)


def save(pipeline: Any, folder: Path, net: Any) -> None:
    """LoRA weights in diffusers' layout where `net` has adapters, else the whole pipeline with `net` in it."""
    if getattr(net, "peft_config", None):
        from peft.utils import get_peft_model_state_dict

        # With the config: the weights alone would be read with alpha equal to the rank.
        config = net.peft_config["default"].to_dict()
        weights = get_peft_model_state_dict(net)
        type(pipeline).save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config)
    else:
        pipeline = copy.copy(pipeline)
        pipeline.unet = net
        pipeline.save_pretrained(folder)


def load_trained(base: Any, folder: Path) -> nn.Module:
    """`base` with the adapters in `folder`, or the UNet that is there.

    Raises:
        ValueError: its files are damaged.
    """
    with intact("output", folder, "a trained model", "`mmalign train` writes it anew"):
        if (folder / ADAPTERS).is_file():
            base.load_lora_adapter(folder, prefix="unet", weight_name=ADAPTERS)
            return base  # type: ignore[no-any-return]
        net: nn.Module = type(base).from_pretrained(folder / "unet", dtype=base.dtype).to(base.device)
    return net.requires_grad_(False).eval()


def repeat_rows(cond: Conditioning, number: int) -> Conditioning:
    """`number` copies of a single row."""
    return Conditioning({k: x.expand(number, *x.shape[1:]) for k, x in cond.tensors.items()})
