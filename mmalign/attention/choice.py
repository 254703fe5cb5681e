"""Selection of the attention backend for the recipe's `train.attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmalign.attention.kernels import platform_unsupported_reason, unsupported_reason


@dataclass(frozen=True)
class SelectedBackend:
    """An attention backend, with the reason for it.

    Attributes:
        backend: "xformers" or "sdpa".
        reason: why "auto" did not choose xformers; else None.
    """

    backend: str
    reason: str | None = None

    def __str__(self) -> str:
        why = f", since xformers is not supported: {self.reason}" if self.reason else ""
        return f"attention: {self.backend}{why}"


def check(requested: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse xformers where it supports no model at all.

    Call this before diffusers is imported, whatever backend is requested: diffusers imports xformers, which may need a
    library loaded first, warn without cause, or fail.

    Raises:
        ValueError: xformers is requested, and supports no model here.
    """
    why = platform_unsupported_reason(device, dtype)
    if why and requested == "xformers":
        raise _unsupported(why)


def select_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int], model: str | None = None
) -> SelectedBackend:
    """Select the attention backend; "auto" is xformers where it is supported, else sdpa.

    Args:
        requested: "auto", "xformers" or "sdpa".
        device: the model's device.
        dtype: the dtype of queries, keys and values, after autocast.
        head_sizes: the head dimensions of all attention layers.
        model: a reason of the model's own against xformers.

    Raises:
        ValueError: xformers is requested, and is not supported.
    """
    if requested == "sdpa":
        return SelectedBackend("sdpa")
    why = unsupported_reason(device, dtype, head_sizes) or model
    if why and requested == "xformers":
        raise _unsupported(why)
    return SelectedBackend("sdpa" if why else "xformers", why)


def install_backend(requested: str, choice: SelectedBackend, install: Callable[[str], None]) -> SelectedBackend:
    """Install the selected backend in a model, and return it; PyTorch's (sdpa) is the model's own.

    Args:
        requested: "auto", "xformers" or "sdpa"; "auto" falls back to sdpa where the model's layers are unknown.
        choice: the selected backend.
        install: a function that installs a backend by its name; it raises ValueError if the layers are unknown.

    Raises:
        ValueError: xformers is requested, and the model's layers are unknown.
    """
    if choice.backend == "sdpa":
        return choice
    try:
        install(choice.backend)
    except ValueError as error:
        if requested != "auto":
            raise
        return SelectedBackend("sdpa", str(error).removeprefix("train.attention: "))
    return choice


def _unsupported(why: str) -> ValueError:
    return ValueError(f"train.attention: xformers is not supported: {why}; use auto or sdpa")
