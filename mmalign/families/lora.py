"""Low-rank adapters for networks of diffusers and transformers (arXiv:2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmalign.reading.weights import sort_metadata

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import PreTrainedModel

ADAPTERS = "pytorch_lora_weights.safetensors"  # diffusers' file name
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that diffusers' own preference scripts adapt


def add_lora(
    net: ModelMixin | PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], seed: int, within: str = ""
) -> None:
    """Add adapters to the linear layers whose names end in `targets`; adapter weights are float32 masters.

    `within` names the part of the network to adapt; empty means all of it.

    The first matrix is Gaussian and the second one zero, so the network's initial outputs are unchanged. There is no
    dropout, which would make the policy differ from its reference by chance.

    Raises:
        ValueError: no layer of the network has one of these names.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    # peft accepts several names if it finds one of them; the other names' layers would silently not be trained.
    known = [name for name, _ in net.named_modules() if f"{name}.".startswith(f"{within}.") or not within]
    lost = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in known)]
    if lost or not targets:
        usual = linear_names(net, within) if within else ATTENTION
        raise ValueError(
            f"model.lora.targets: no layer of {within or type(net).__name__} ends in {', '.join(lost) or 'nothing'}; "
            f"expected suffixes of its layers' names, such as {', '.join(usual)}"
        )
    # Adapters, from their own seed
    ends = "|".join(map(re.escape, sorted(targets)))
    modules = rf"{re.escape(within)}\.(.*\.)?({ends})" if within else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights="gaussian")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            net.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"model.lora.targets: {', '.join(targets)} cannot be adapted: {error}") from error
    # Precision of the adapters
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            # Autocast matches the dtypes of inputs and adapters; peft would first copy every input to float32.
            layer.cast_input_dtype_enabled = False
    for parameter in net.parameters():
        if parameter.requires_grad:
            # Half-precision weights would lose updates of 1e-5.
            parameter.data = parameter.data.float()


def save_lora(pipeline: type[DiffusionPipeline], part: str, net: ModelMixin, folder: Path) -> None:
    """Write the adapters of a pipeline's `part` in diffusers' layout, with the same bytes every time."""
    from peft.utils import get_peft_model_state_dict

    # Without the config, diffusers would assume that alpha equals the rank. A set has another order in every process.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in net.peft_config["default"].to_dict().items()}
    weights = {f"{part}_lora_layers": get_peft_model_state_dict(net), f"{part}_lora_adapter_metadata": config}
    pipeline.save_lora_weights(folder, **weights)
    sort_metadata(folder / ADAPTERS)


def linear_names(net: nn.Module, within: str) -> list[str]:
    """Return the last components of the names of all linear layers in a part of a network, each once."""
    prefix = f"{within}."
    names = (name for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and name.startswith(prefix))
    return sorted({name.rpartition(".")[2] for name in names})
