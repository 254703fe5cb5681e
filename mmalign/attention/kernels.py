"""Whether xformers can compute attention here and, if not, why: a sentence for people, and never a silent other way.

What its wheels suffer from, and what is done about it (xformers 0.0.35, as PyPI has it):

* It is built for CUDA 12. Beside a PyTorch for CUDA 13 one library of its own is not found, and xformers then refuses
  attention altogether, although the kernels that it would call are PyTorch's. The runtime of CUDA 12, if it is
  installed (nvidia-cuda-runtime-cu12), is loaded first; without it the flag that xformers derives from that is mended.
* Later versions have moved attention to another package, and are imported without it: what counts is whether the
  function is there, not the version.
* Whether a kernel has gradients for a type and a head's size shows when it is tried.
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

from mmalign.attention import executors
from mmalign.attention.forest import PackedPrefixMask, PrefixGroup

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256  # numbers; a multiple of 8 too: see the table of operators in xformers' ops/fmha
CUDA_12 = "nvidia/cuda_runtime/lib/libcudart.so.12*"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int]) -> str | None:
    """Return the reason why xformers cannot compute a model's attention; None if a trial shows that it can.

    Args:
        device: where.
        dtype: of queries, keys and values.
        head_sizes: numbers of a head, of all attention of the model.
    """
    if wrong := sorted(size for size in head_sizes if size % 8 or size > LARGEST_HEAD):
        return f"heads of {wrong[0]} numbers are none of its sizes, which are the multiples of 8 up to {LARGEST_HEAD}"
    return platform_unsupported_reason(device, dtype) or _failure_reason(device, dtype, head_sizes)


def platform_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why xformers serves no model; None if it may. Imports it, and leaves the device alone."""
    if device.type != "cuda":
        return f"it has no kernels for a {device.type.upper()}"
    if dtype not in DTYPES:
        return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    return _unusable_reason()


@cache
def _unusable_reason() -> str | None:
    """Why the package as it is installed cannot be used."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed (pip install 'mmalign[cuda]')"
    _load_cuda_12()
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns of what is mended below
    try:
        ops = importlib.import_module("xformers.ops")
        version = importlib.import_module("xformers").__version__
        if not hasattr(ops, "memory_efficient_attention"):
            return f"xformers {version} has no memory_efficient_attention (pip install 'xformers>=0.0.35,<0.0.36')"
        fmha = importlib.import_module("xformers.ops.fmha")
        common: Any = importlib.import_module("xformers.ops.fmha.common")
    except Exception as error:  # what is wrong with a compiled package shows in many ways
        return f"it cannot be imported ({_first_line(error)})"
    if not getattr(common, "_built_with_cuda", True):
        if not (fmha.flash.FwOp.is_available() and fmha.cutlass.FwOp.is_available()):
            return f"xformers {version} is for another CUDA than {torch.version.cuda}, which PyTorch is for"
        common._built_with_cuda = True
    return None


def _load_cuda_12() -> None:
    """Load the runtime of CUDA 12 beside that of a newer CUDA, before xformers looks for it."""
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
    """What happens when it is tried, forwards and backwards, with every kind of mask that we give it."""
    packed_mask = PackedPrefixMask((PrefixGroup(8, (5, 3), bidirectional_prefix=True),))
    try:
        seen = torch.ones(packed_mask.length, dtype=torch.bool, device=device)[None, None, None]
        for size in sorted(head_sizes):
            for mask in (None, packed_mask, seen):
                x = torch.zeros(1, packed_mask.length, 2, size, device=device, dtype=dtype, requires_grad=True)
                executors.xformers(x, x, x, mask).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"it was tried and failed ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    """What an error says first; xformers' own go on for a page, one line for every operator."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').strip()[:200]}"
