"""Pipelines from a single file of weights, in the layout of the original authors or of ComfyUI."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_single_file(
    cls: type[DiffusionPipeline],
    part: str,
    path: str,
    config: str,
    dtype: torch.dtype | dict[str, torch.dtype],
    options: Mapping[str, Any],
) -> DiffusionPipeline:
    """Load a pipeline whose weights are in one file.

    A file of Stable Diffusion has all parts. That of a transformer has the transformer alone, and the other parts come
    from the folder or Hub id with the configuration.

    Args:
        cls: the pipeline's class.
        part: the denoiser's name in it.
        path: the file.
        config: a folder or Hub id of a pipeline with the same layout.
        dtype: the dtype of all parts, or one by part.
        options: arguments that load the pipeline `config`: its revision, its files, and parts in place of its own.
    """
    local: dict[str, Any] = {"local_files_only": True} if Path(config).is_dir() else {}
    revision = options.get("revision")
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    # Stable Diffusion: the reader takes one dtype, so each part gets its own afterwards
    if part == "unet":
        if "SafetyChecker" in str(cls.__init__.__annotations__):
            local |= {"safety_checker": None, "requires_safety_checker": False}
        # Weights of the pipeline `config` are not read
        local |= {key: value for key, value in options.items() if key not in ("variant", "use_safetensors")}
        pipeline = cls.from_single_file(path, config=config, torch_dtype=torch.float32, **local)
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                module.to(dtypes.get(name, dtypes["default"]))
        return pipeline
    # A transformer alone, whose class the configuration names
    index = cls.load_config(config, revision=revision)
    kind: Any = getattr(importlib.import_module(index[part][0]), index[part][1])
    own = dtypes.get(part, dtypes["default"])
    own_file = {"config": config, "config_revision": revision, "subfolder": part, **local}
    denoiser = kind.from_single_file(path, torch_dtype=own, **own_file)
    return cls.from_pretrained(config, dtype=dtypes, **{**options, part: denoiser})
