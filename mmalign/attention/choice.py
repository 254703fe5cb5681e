"""Which executor a model's attention gets, by what a recipe's `train.attention` wants and what there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmalign.attention.kernels import platform_unsupported_reason, unsupported_reason


@dataclass(frozen=True)
class SelectedBackend:
    """An executor, and why it is this one.

    Attributes:
        backend: "xformers" or "sdpa".
        reason: what speaks against xformers, where it was not asked to stay away; else empty.
    """

    backend: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"attention: {self.backend}" + (f", since xformers cannot serve: {self.reason}" if self.reason else "")


def check(requested: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what `choose` would refuse whatever the model.

    To be called before diffusers is imported: it imports xformers, which may not find all that it needs by itself.

    Raises:
        ValueError: xformers is wanted, and can serve no model here.
    """
    if requested != "sdpa" and (why := platform_unsupported_reason(device, dtype)):
        _refuse(requested, why)


def select_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int], model: str | None = None
) -> SelectedBackend:
    """What computes attention: "sdpa" is itself, "auto" is xformers where it can serve and else sdpa.

    Args:
        requested: "auto", "xformers" or "sdpa".
        device: where.
        dtype: of queries, keys and values: what autocast makes of them, if it is on.
        head_sizes: numbers of a head, of all attention of the model.
        model: what else of the model speaks against xformers.

    Raises:
        ValueError: xformers is wanted, and cannot serve.
    """
    if requested == "sdpa":
        return SelectedBackend("sdpa")
    if why := unsupported_reason(device, dtype, head_sizes) or model:
        _refuse(requested, why)
        return SelectedBackend("sdpa", why)
    return SelectedBackend("xformers")


def _refuse(wanted: str, why: str) -> None:
    if wanted == "xformers":
        raise ValueError(f"train.attention: xformers cannot serve: {why}; use auto or sdpa")
