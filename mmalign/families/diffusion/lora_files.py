"""LoRA files of diffusers, kohya and ComfyUI, read by the pipeline's own reader.

Diffusers has no reader of sd-scripts' names of Stable Diffusion 3. It has a converter of whole original checkpoints,
which says what the layers of such a file are.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.families.diffusion.lora_names import Weights, sd3_layers, underscored

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


def load_lora(pipeline: DiffusionPipeline, net: ModelMixin, source: str, *, file: str | None, adapter: str) -> None:
    """Add the adapters of a file to the denoiser of a pipeline.

    Args:
        pipeline: the pipeline, which holds `net`.
        net: the denoiser.
        source: the file's folder, or a Hub id.
        file: the file's name; None lets the reader find it.
        adapter: the name of the new adapters.

    Raises:
        ValueError: the file names a layer that the network lacks.
    """
    options = {"weight_name": file, "use_safetensors": True}
    if type(pipeline).__name__ == "StableDiffusion3Pipeline":
        weights = pipeline.lora_state_dict(source, **options)
        if any(name.startswith("lora_") for name in weights):  # diffusers' names begin with a part of the pipeline
            pipeline.load_lora_weights(sd3_weights(weights, net), adapter_name=adapter)
            return
    pipeline.load_lora_weights(source, adapter_name=adapter, **options)


def sd3_weights(weights: Weights, net: ModelMixin) -> Weights:
    """Return the tensors of sd-scripts' file for SD3 by diffusers' names.

    Raises:
        ValueError: the file names a layer that the network lacks.
    """
    rows, renamed = _sd3_rows(net), Weights()
    known = {underscored(layer) for layer, _ in rows.values()}
    if unknown := sorted({name.partition(".")[0] for name in weights} - known):
        raise ValueError(f"its layer {unknown[0]} is none of a {type(net).__name__}")
    # A layer of diffusers may be some rows of an original one; alpha / rank is folded into its second matrix
    for layer, (original, places) in rows.items():
        name = underscored(original)
        if (key := f"{name}.lora_down.weight") in weights:
            down, up = weights[key], weights[f"{name}.lora_up.weight"]
            scale = float(weights.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
            renamed[f"transformer.{layer}.lora_A.weight"] = down
            renamed[f"transformer.{layer}.lora_B.weight"] = up[places] * scale
    return renamed


def _sd3_rows(net: ModelMixin) -> dict[str, tuple[str, Tensor]]:
    """Return the original layer that holds each of diffusers' layers, and the rows in it.

    A checkpoint whose weights are the numbers of their own rows is converted; the numbers then tell the place.
    """
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    # The rows of all original layers, numbered through, in place of their weights
    originals, begins = list(sd3_layers(net).items()), [0]
    checkpoint = {"pos_embed": torch.zeros(0)}
    for layer, parts in originals:
        numbers = begins[-1] + torch.arange(sum(len(net.get_submodule(part).bias) for part in parts))
        checkpoint |= {f"{layer}.weight": numbers, f"{layer}.bias": numbers}
        begins.append(begins[-1] + len(numbers))
    # The numbers that arrive in a layer tell the original layer and the rows in it
    rows = {}
    for name, numbers in convert_sd3_transformer_checkpoint_to_diffusers(checkpoint).items():
        if name.endswith(".weight"):
            index = bisect_right(begins, int(numbers[0])) - 1
            rows[name.removesuffix(".weight")] = originals[index][0], numbers - begins[index]
    assert not checkpoint, checkpoint.keys()  # the converter takes out what it knows
    return rows
