"""Networks of a checkpoint's configurations alone: right shapes and dtypes, no weights, no memory.

A network is built on the meta device, adapters and copies included. `without_storage` then makes its tensors fake ones
of a CPU, on which every operation of a training step runs without computing anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

META = torch.device("meta")
CONFIGURATIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, tokenizers, processors; no weights


def fetch_configurations(path: str, revision: str | None) -> str:
    """Return the folder with a model's configurations: a local one, or the Hub's few small files.

    Raises:
        ValueError: they are neither here nor can be fetched; the message names the files.
    """
    from pathlib import Path

    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path, revision=revision, allow_patterns=list(CONFIGURATIONS))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: the configurations of {path} are not at hand and did not come from the Hub; a plan needs the "
            "small files only: model_index.json with every part's config.json, scheduler and tokenizer, or config.json "
            "with tokenizer and processor. Fetch them with: hf download "
            f"{path} {' '.join(f'--include {chr(39)}{pattern}{chr(39)}' for pattern in CONFIGURATIONS)}"
        ) from error


def build_pipeline_parts(path: str, index: dict[str, Any], dtypes: dict[str, torch.dtype]) -> dict[str, nn.Module]:
    """Return the networks that the index of a diffusers pipeline names, built from their configurations."""
    parts = {}
    for part, kind in index.items():
        # Parts that are no networks: left out, a tokenizer, a scheduler
        if not isinstance(kind, list | tuple) or kind[0] not in ("diffusers", "transformers"):
            continue
        cls = getattr(importlib.import_module(kind[0]), kind[1])
        if not issubclass(cls, nn.Module):
            continue
        dtype = dtypes.get(part, dtypes["default"])
        with META:
            if kind[0] == "diffusers":
                net = cls.from_config(cls.load_config(path, subfolder=part))
            else:
                net = cls._from_config(cls.config_class.from_pretrained(path, subfolder=part))
        parts[part] = nn.Module.to(net, dtype)  # the library's own `to` warns of parts that stay in float32
    return parts


def _fake(mode: FakeTensorMode, tensor: Any) -> Tensor:
    """Return a fake tensor of a CPU, with fake ones inside if it is quantized."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not is_traceable_wrapper_subclass(tensor):
        fake: Tensor = FakeTensor(mode, tensor, torch.device("cpu"))
        return fake
    # A quantized tensor is a wrapper: its parts become fake ones, and are wrapped again
    cls: Any = type(tensor)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _fake(mode, getattr(tensor, name)) for name in names}
    whole: Tensor = cls.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return whole


def without_storage(nets: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace the tensors of networks on the meta device by fake tensors of a CPU, in place; tied ones stay tied."""
    from torch._subclasses.fake_tensor import FakeTensor

    replaced: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            value = _fake(mode, tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        return replaced[id(tensor)]

    for net in nets:
        for module in net.modules():
            # Attributes too: Qwen-Image's rotary frequencies are no buffers
            own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for tensors in own:
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, Tensor) and tensor.device == META and not isinstance(tensor, FakeTensor):
                        tensors[name] = fake(tensor)
