"""Compilation of a network's blocks (`train.compile`).

Blocks are compiled instead of the whole network. They are alike, so the code compiled for the first serves the others.
The code between blocks (LoRA of another scale, a packed mask of other lengths) is not compiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn

GRAPHS = 64  # per block: with and without gradients, adapters on and off, for a few shapes; PyTorch's limit is 8


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Mark blocks for compilation at their first call; their names and weights stay the same."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile()


def denoiser_blocks(net: nn.Module) -> list[nn.Module]:
    """Return the outermost transformer blocks of a diffusers network, in order, by the class names in the library.

    Raises:
        ValueError: the library names no blocks of the network.
    """
    names = getattr(net, "_repeated_blocks", None) or getattr(net, "_no_split_modules", None) or ()
    blocks: list[tuple[str, nn.Module]] = []
    # `named_modules` yields a module before its parts, so the outermost comes first
    for name, module in net.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in blocks)
        if type(module).__name__ in names and not inside:
            blocks.append((name, module))
    if not blocks:
        raise ValueError(f"train.compile: diffusers does not list the blocks of a {type(net).__name__}; leave it out")
    return [module for _, module in blocks]


def check(device: torch.device) -> None:
    """Refuse a device without a compiler, which would otherwise fail in the first update.

    Raises:
        ValueError: there is no compiler for the device.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "train.compile: needs triton, which does not run here; pip install triton, or leave it out"
            )
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # where triton looks
            raise ValueError(
                "train.compile: needs a C compiler, and none was found; install gcc, set CC to one, or leave it out"
            )
        return
    # A CPU needs a C++ compiler alone
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "train.compile: needs a C++ compiler, and none was found; install g++, set CXX to one, or leave it out"
        ) from None
