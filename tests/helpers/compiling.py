"""Compilation that traces, but generates no code, which takes most of the time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def traced() -> Iterator[None]:
    """Run compiled blocks as PyTorch traced them."""
    before = torch.compiler.get_default_backend()
    torch._dynamo.reset()
    torch.compiler.set_default_backend("eager")
    try:
        yield
    finally:
        torch.compiler.set_default_backend(before)
        torch._dynamo.reset()
