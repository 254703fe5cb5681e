"""Optimizers, learning rate schedules, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        if name == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1.0

    return factor


class EMA:
    """Exponential moving average of parameters, in float32.

    The decay of update n is the smaller of `decay` and (1 + n) / (10 + n). The first updates thus weigh more, and the
    average forgets the initial parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.shadow = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Add the parameters after update number `step` (the first is 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Sequence[nn.Parameter]) -> None:
        """Swap the average and the parameters; a second call swaps them back."""
        for average, parameter in zip(self.shadow, parameters, strict=True):
            saved = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(saved)

    def state(self) -> list[Tensor]:
        """Return the average, for a checkpoint."""
        return self.shadow

    def load(self, shadow: Sequence[Tensor]) -> None:
        """Load the average of a checkpoint."""
        for mine, saved in zip(self.shadow, shadow, strict=True):
            mine.copy_(saved)
