"""Image features as named tensors and back, and the frozen parts that compute them.

Transformers returns an object, and a decoder reads a few of its attributes. `pooler_output` has the features, as one
tensor or one per image. `deepstack_features` has those of several layers. This project adds `grid`, from which
positions are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.attention import denoisers

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

POOLED, DEEP, GRID = "pooled", "deep", "grid"


def pack_features(features: BaseModelOutputWithPooling) -> dict[str, Tensor]:
    """Return an image's features as named tensors."""
    pooled = features.pooler_output
    # Features of an image are one tensor or several, by model; those of deeper layers beside them
    parts = {POOLED: pooled} if isinstance(pooled, Tensor) else {f"{POOLED}.{i}": x for i, x in enumerate(pooled)}
    for number, layer in enumerate(getattr(features, "deepstack_features", None) or ()):
        parts |= {f"{DEEP}.{number}.{i}": x for i, x in enumerate(layer)}
    if getattr(features, "grid", None) is not None:
        parts[GRID] = features.grid
    return parts


def unpack_features(parts: dict[str, Tensor], device: torch.device) -> BaseModelOutputWithPooling:
    """Rebuild on a device the attributes that a decoder reads of the argument of `pack_features`."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tensors = {name: x.to(device) for name, x in parts.items()}
    pooled = tensors[POOLED] if POOLED in tensors else _numbered(tensors, POOLED)
    output = BaseModelOutputWithPooling(pooler_output=pooled)
    layers = sum(name.startswith(f"{DEEP}.") and name.endswith(".0") for name in tensors)
    if layers:
        # Set as an item, which sets the attribute too: code that moves the object between devices reads its items.
        output["deepstack_features"] = [_numbered(tensors, f"{DEEP}.{number}") for number in range(layers)]
    output.grid = tensors.get(GRID)
    return output


def _numbered(parts: dict[str, Tensor], name: str) -> list[Tensor]:
    number = sum(key.rpartition(".")[0] == name for key in parts)
    return [parts[f"{name}.{i}"] for i in range(number)]


def frozen_parts(net: nn.Module, learning: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield, by name, the largest modules that have parameters and none whose `id` is in `learning`."""

    def within(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        own = {id(p) for p in module.parameters()}
        if own and not own & learning:
            yield name, module
        elif own:
            for child, part in module.named_children():
                yield from within(part, f"{name}.{child}" if name else child)

    return within(net, "")


def backend_name(net: nn.Module) -> str:
    """Describe the setup that a network's numbers depend on: device, precision of the weights, attention backend."""
    configs = (getattr(part, "config", None) for part in net.modules())
    attention = {getattr(config, "_attn_implementation", None) for config in configs}
    attention |= {type(part.processor).__name__ for part in net.modules() if hasattr(part, "processor")}
    attention |= {denoisers.installed(net)}
    weights = {f"{p.device.type} {str(p.dtype).removeprefix('torch.')}" for p in net.parameters()}
    return ", ".join((*sorted(weights), *sorted(str(name) for name in attention if name)))


def move_parameters(module: nn.Module, device: torch.device) -> None:
    """Move a module's parameters to a device, but not its buffers.

    Buffers are small, and distributed training sends all of them from one process to the others.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device)
