"""Which executor a model's attention gets, by what a recipe's `train.attention` wants and what there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmalign.attention.kernels import why_not, why_not_here


@dataclass(frozen=True)
class Choice:
    """An executor, and why it is this one.

    Attributes:
        executor: "xformers" or "sdpa".
        why: what speaks against xformers, where it was not asked to stay away; else empty.
    """

    executor: str
    why: str = ""

    def __str__(self) -> str:
        return f"attention: {self.executor}" + (f", since xformers cannot serve: {self.why}" if self.why else "")


def check(wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what `choose` would refuse whatever the model.

    To be called before diffusers is imported: it imports xformers, which may not find all that it needs by itself.

    Raises:
        ValueError: xformers is wanted, and can serve no model here.
    """
    if wanted != "sdpa" and (why := why_not_here(device, dtype)):
        _refuse(wanted, why)


def choose(
    wanted: str, device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int], model: str = ""
) -> Choice:
    """What computes attention: "sdpa" is itself, "auto" is xformers where it can serve and else sdpa.

    Args:
        wanted: "auto", "xformers" or "sdpa".
        device: where.
        dtype: of queries, keys and values: what autocast makes of them, if it is on.
        head_sizes: numbers of a head, of all attention of the model.
        model: what else of the model speaks against xformers.

    Raises:
        ValueError: xformers is wanted, and cannot serve.
    """
    if wanted == "sdpa":
        return Choice("sdpa")
    if why := why_not(device, dtype, head_sizes) or model:
        _refuse(wanted, why)
        return Choice("sdpa", why)
    return Choice("xformers")


def _refuse(wanted: str, why: str) -> None:
    if wanted == "xformers":
        raise ValueError(f"train.attention: xformers cannot serve: {why}; use auto or sdpa")
