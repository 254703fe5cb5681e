"""Checks whether xformers runs here, with the reason if it does not.

Workarounds for its wheels (xformers 0.0.35 on PyPI):

* They are built for CUDA 12 and one PyTorch. Beside others its compiled part may fail to load. It then refuses all
  attention, although the kernels that it would call are PyTorch's. The CUDA 12 runtime (nvidia-cuda-runtime-cu12) is
  loaded first if it is installed. Otherwise the flag that xformers derives from that failure is reset.
* diffusers imports an installed xformers, and fails if that fails. One that cannot be imported is hidden from it.
* Later versions moved attention to another package, and earlier ones were not tested.
* Support for the gradients of a dtype and head dimension shows only in a trial run.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from mmalign.attention import backends
from mmalign.attention.packed_mask import PackedPrefixMask, PrefixGroup
from mmalign.reading import error_line

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256  # head dimension, also a multiple of 8: the table of operators in xformers' ops/fmha
SUPPORTED = ">=0.0.35,<0.0.36"  # as in the extra `cuda`
CUDA_12 = "nvidia/cuda_runtime/lib/libcudart.so.12*"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int]) -> str | None:
    """Return the reason why xformers cannot compute a model's attention; None if a trial run succeeds.

    Args:
        device: the model's device.
        dtype: the dtype of queries, keys and values.
        head_sizes: the head dimensions of all attention layers.
    """
    if wrong := sorted(size for size in head_sizes if size % 8 or size > LARGEST_HEAD):
        return f"the model's head dimension is {wrong[0]}; it supports multiples of 8 up to {LARGEST_HEAD}"
    if not head_sizes:
        return "the model does not state its head dimension"
    return platform_unsupported_reason(device, dtype) or _failure_reason(device, dtype, head_sizes)


def platform_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why xformers supports no model here; None if it may.

    This imports xformers on every device, and does not touch the device.
    """
    # Imported even where it is no use, since a broken package must be hidden from diffusers
    package = _unusable_reason()
    if device.type != "cuda":
        return f"it has no kernels for a {device.type.upper()}"
    if dtype not in DTYPES:
        return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    return package


@cache
def _unusable_reason() -> str | None:
    """Return the reason why the installed package cannot be used; None if it can."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed (pip install 'mmalign[cuda]')"
    # The compiled part looks for the runtime while it is imported
    _load_cuda_12()
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns about the compiled part, which is handled below
    try:
        version = str(importlib.import_module("xformers").__version__)
        importlib.import_module("xformers.ops")
    except Exception as error:  # a broken compiled package raises many types
        sys.modules["xformers"] = None  # type: ignore[assignment]  # Python's mark of a package that is not there
        return f"it cannot be imported ({error_line(error)}); pip install 'mmalign[cuda]' installs it again"
    if not SpecifierSet(SUPPORTED).contains(version):
        return f"xformers {version} is installed, expected xformers{SUPPORTED} (pip install 'xformers{SUPPORTED}')"
    return _missing_kernels_reason(version)


def _missing_kernels_reason(version: str) -> str | None:
    """Return the reason why there are no kernels for CUDA; None if there are, also where xformers denies it."""
    fmha = importlib.import_module("xformers.ops.fmha")
    common: Any = importlib.import_module("xformers.ops.fmha.common")
    # Built for CUDA, as xformers itself sees it
    if common._built_with_cuda:
        return None
    if not (fmha.flash.FwOp.is_available() and fmha.cutlass.FwOp.is_available()):
        library: Any = importlib.import_module("xformers._cpp_lib")
        error, part = library._cpp_library_load_exception, "has no compiled part"
        if isinstance(error, library.xFormersInvalidLibException) and error.build_info is not None:
            part = f"is built for PyTorch {error.build_info.torch_version}"
        return (
            f"xformers {version} {part}, and PyTorch {torch.__version__} (CUDA {torch.version.cuda or 'none'}) has no "
            "kernels in its place; install the PyTorch that it names, or reinstall xformers"
        )
    # PyTorch has the kernels, and this flag alone keeps xformers from calling them
    common._built_with_cuda = True
    return None


def _load_cuda_12() -> None:
    """Load the CUDA 12 runtime in addition to that of a newer CUDA, before xformers looks for it."""
    if "xformers" in sys.modules or (torch.version.cuda or "12").startswith("12"):
        return
    for file in (file for folder in sys.path for file in sorted(Path(folder or ".").glob(CUDA_12))):
        try:
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


@cache
def _failure_reason(device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int]) -> str | None:
    """Return the error of a trial forward and backward pass with every type of mask; None if all succeed."""
    packed_mask = PackedPrefixMask((PrefixGroup(8, (5, 3), bidirectional_prefix=True),))
    try:
        dense_mask = torch.ones(packed_mask.length, dtype=torch.bool, device=device)[None, None, None]
        for size in sorted(head_sizes):
            for mask in (None, packed_mask, dense_mask):
                x = torch.zeros(1, packed_mask.length, 2, size, device=device, dtype=dtype, requires_grad=True)
                backends.xformers(x, x, x, mask).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"a trial run failed ({error_line(error)})"
    return None
