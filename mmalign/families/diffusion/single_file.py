"""Pipelines from a single file of weights, in the layout of the original authors or of ComfyUI."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_single_file(
    cls: type[DiffusionPipeline], part: str, path: str, config: str, dtype: torch.dtype | dict[str, torch.dtype]
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
    """
    options: dict[str, Any] = {"local_files_only": True} if Path(config).is_dir() else {}
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    # Stable Diffusion: the reader takes one dtype, so each part gets its own afterwards
    if part == "unet":
        if "SafetyChecker" in str(cls.__init__.__annotations__):
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = cls.from_single_file(path, config=config, torch_dtype=torch.float32, **options)
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                module.to(dtypes.get(name, dtypes["default"]))
        return pipeline
    # A transformer alone, whose class the configuration names
    index = cls.load_config(config)
    kind: Any = getattr(importlib.import_module(index[part][0]), index[part][1])
    own = dtypes.get(part, dtypes["default"])
    denoiser = kind.from_single_file(path, config=config, subfolder=part, torch_dtype=own, **options)
    return cls.from_pretrained(config, **{part: denoiser}, dtype=dtypes)
