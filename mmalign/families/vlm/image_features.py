"""What a vision tower and its projector make of an image, as tensors by name, and back; and where the tower is.

Transformers gives an object of which a decoder reads a few attributes: the features of the image (`pooler_output`: a
tensor, or one for each picture), those of several layers (`deepstack_features`), and here the grid that positions are
made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.attention import denoisers

POOLED, DEEP, GRID = "pooled", "deep", "grid"


def pack_features(features: Any) -> dict[str, Tensor]:
    """An image's features by name."""
    pooled = features.pooler_output
    parts = {POOLED: pooled} if isinstance(pooled, Tensor) else {f"{POOLED}.{i}": x for i, x in enumerate(pooled)}
    for number, layer in enumerate(getattr(features, "deepstack_features", None) or ()):
        parts |= {f"{DEEP}.{number}.{i}": x for i, x in enumerate(layer)}
    if getattr(features, "grid", None) is not None:
        parts[GRID] = features.grid
    return parts


def unpack_features(parts: dict[str, Tensor], device: torch.device) -> Any:
    """What `packed` was given, so far as a decoder reads it, on a device."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tensors = {name: x.to(device) for name, x in parts.items()}
    pooled: Any = tensors[POOLED] if POOLED in tensors else _numbered(tensors, POOLED)
    output: Any = BaseModelOutputWithPooling(pooler_output=pooled)
    layers = sum(name.startswith(f"{DEEP}.") and name.endswith(".0") for name in tensors)
    if layers:
        # As an item, which is an attribute, too: who sends it to other devices takes an object apart by its items.
        output["deepstack_features"] = [_numbered(tensors, f"{DEEP}.{number}") for number in range(layers)]
    output.grid = tensors.get(GRID)
    return output


def _numbered(parts: dict[str, Tensor], name: str) -> list[Tensor]:
    number = sum(key.rpartition(".")[0] == name for key in parts)
    return [parts[f"{name}.{i}"] for i in range(number)]


def frozen_parts(net: nn.Module, learning: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts of a network that have parameters, and none of those named by `id` in `learning`."""

    def within(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        own = {id(p) for p in module.parameters()}
        if own and not own & learning:
            yield name, module
        elif own:
            for child, part in module.named_children():
                yield from within(part, f"{name}.{child}" if name else child)

    return within(net, "")


def backend_name(net: nn.Module) -> str:
    """How a network is run, so far as its numbers depend on it: device, the weights' precision, what does attention."""
    configs = (getattr(part, "config", None) for part in net.modules())
    attention = {getattr(config, "_attn_implementation", None) for config in configs}
    attention |= {type(part.processor).__name__ for part in net.modules() if hasattr(part, "processor")}
    attention |= {denoisers.installed(net)}
    weights = {f"{p.device.type} {str(p.dtype).removeprefix('torch.')}" for p in net.parameters()}
    return ", ".join((*sorted(weights), *sorted(str(name) for name in attention if name)))


def move_parameters(module: nn.Module, device: torch.device) -> None:
    """Move a part of a network, but for its buffers: they are small, and whoever trains with several processes sends
    them all from one to another.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device)
