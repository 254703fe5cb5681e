"""Existing adapters and trained weights of a pipeline's denoiser, read by diffusers or peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.attention import denoisers
from mmalign.families.diffusion.lora_files import load_lora
from mmalign.families.diffusion.sizes import denoiser_name
from mmalign.families.lora import (
    ADAPTERS,
    PEFT_ADAPTERS,
    PEFT_CONFIG,
    TRAINED,
    absorb_adapters,
    adapter_layers,
    check_adapter_path,
    check_halves,
    in_float32,
    set_up_adapters,
)
from mmalign.reading.weights import intact, tensors_only

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


def merge_adapter(pipeline: DiffusionPipeline, net: ModelMixin, path: str) -> None:
    """Add existing adapters to the weights of a denoiser; arguments and errors as in `read_adapter`."""
    read_adapter(pipeline, net, path)
    absorb_adapters(net)


def read_adapter(pipeline: DiffusionPipeline, net: ModelMixin, path: str) -> None:
    """Add existing adapters to a denoiser: a file or folder of diffusers, kohya, ComfyUI or peft, or a Hub id.

    Args:
        pipeline: the pipeline, whose class knows the files' layouts.
        net: the denoiser that gets the adapters.
        path: the file, the folder or the Hub id.

    Raises:
        ValueError: it cannot be read, has no weights of the denoiser, or has some of a text encoder.
    """
    from peft import PeftModel

    check_adapter_path(path)
    # The reader adds adapters to the network of the pipeline that it gets, here a copy with `net`
    pipeline, part, place = copy.copy(pipeline), denoiser_name(pipeline), Path(path)
    setattr(pipeline, part, net)
    with intact("model.adapter", path, f"adapters of a {type(pipeline).__name__}"), tensors_only(), in_float32():
        # A folder of peft's, or a file in any layout that the pipeline's reader knows
        if (place / PEFT_CONFIG).is_file():
            PeftModel.from_pretrained(net, path, adapter_name=TRAINED)
            check_halves(place / PEFT_ADAPTERS)
        else:
            files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
            source, name = (str(files[0].parent), files[0].name) if files else (path, None)
            load_lora(pipeline, net, source, file=name, adapter=TRAINED)
            for file in files[:1]:
                check_halves(file)
    others = [name for name, x in pipeline.components.items() if name != part and getattr(x, "peft_config", None)]
    if others:
        raise ValueError(
            f"model.adapter: {path} also adapts {', '.join(others)}, which mmalign keeps frozen; merge it by "
            "diffusers' fuse_lora, and name the merged pipeline as model.path"
        )
    if not adapter_layers(net):
        raise ValueError(f"model.adapter: {path} has no weights of the {part}; expected an adapter of this model")


def load_trained(base: ModelMixin, part: str, folder: Path) -> ModelMixin:
    """Return `base` with the adapters in `folder`, or else the denoiser saved there under the name `part`.

    Raises:
        ValueError: the files are damaged.
    """
    with intact("output", folder, "a trained model", "`mmalign train` writes it again"), tensors_only():
        if (folder / ADAPTERS).is_file():
            check_halves(folder / ADAPTERS)
            with in_float32():
                base.load_lora_adapter(folder, prefix=part, weight_name=ADAPTERS, adapter_name=TRAINED)
            set_up_adapters(base)
            return base
        net = type(base).from_pretrained(folder / part, dtype=base.dtype).to(base.device)
    # A new network has diffusers' attention, and gets the backend of the base
    if (backend := denoisers.installed(base)) is not None:
        denoisers.install(net, backend)
    return net.requires_grad_(False).eval()
