"""The blocks that a network is made of, each compiled: `train.compile`.

Not the network as one: its blocks are alike, so that what is compiled for the first serves the others, and what a
network does between them (LoRA of another scale, a forest of other lengths) stays as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

GRAPHS = 64  # of one block: with gradients and without, adapters on and off, for a few shapes; PyTorch has 8


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have blocks compiled when they are first called; their names and weights stay what they are."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile()


def denoiser_blocks(net: Any) -> list[nn.Module]:
    """The transformer blocks of a network of diffusers, outermost first, by the names that the library gives them.

    Raises:
        ValueError: it gives none.
    """
    names = getattr(net, "_repeated_blocks", None) or getattr(net, "_no_split_modules", None) or ()
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in net.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in blocks)
        if type(module).__name__ in names and not inside:
            blocks.append((name, module))
    if not blocks:
        raise ValueError(
            f"train.compile: diffusers does not say which blocks a {type(net).__name__} is made of; leave it out"
        )
    return [module for _, module in blocks]


def check(device: torch.device) -> None:
    """Refuse what would otherwise fail in the first update.

    Raises:
        ValueError: there is no compiler for the device.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "train.compile: needs triton, which does not run here; pip install triton, or leave it out"
            )
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # where triton looks for one
            raise ValueError(
                "train.compile: needs a C compiler, and none was found; install gcc, set CC to one, or leave it out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "train.compile: needs a C++ compiler, and none was found; install g++, set CXX to one, or leave it out"
        ) from None
