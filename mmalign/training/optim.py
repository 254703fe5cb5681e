"""Optimizers, learning rate schedules, and the decay of a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    name: str,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    undecayed: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer called `name`: "adamw" (fused), "adamw_8bit" (bitsandbytes) or "adafactor".

    Adafactor has a fixed rate, no scaling by the parameters' size, as in the releases, and no betas. The weights of
    `undecayed` have no weight decay.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    # Parameters with weight decay, and those without
    groups: Any = [{"params": list(parameters)}]
    groups += [{"params": list(undecayed), "weight_decay": 0.0}] if undecayed else []
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if name == "adafactor":
        from transformers import Adafactor

        fixed = {"scale_parameter": False, "relative_step": False}
        optimizer: torch.optim.Optimizer = Adafactor(groups, lr=lr, weight_decay=weight_decay, **fixed)
        return optimizer
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install 'mmalign[cuda]', or "
            "use adamw"
        ) from None
    optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    return optimizer


def schedule(name: str, *, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the updates done: a linear warm-up, then `name`.

    "constant" stays at 1; "linear" and "cosine" fall to 0 at `steps`.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            # Never 0: the first update moves the weights, too
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        if name == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1.0

    return factor


def average_share(step: int, *, decay: float) -> float:
    """Return the share of the weights after update `step` in their moving average.

    The decay of update n is the smaller of `decay` and (1 + n) / (10 + n). The first updates thus weigh more, and the
    average forgets the initial parameters.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
