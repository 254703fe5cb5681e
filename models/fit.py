"""Training loop of the bundled models, with resumption from checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn


def fit(
    name: str,
    work: Path,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    save: Callable[[nn.Module], None],
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train by AdamW with a warm-up and a cosine to a twentieth; return the averaged model.

    Checkpoints are written every 90 seconds or so, and at the end. `loss(step)` must depend on the step alone, so that
    resuming gives the result of an uninterrupted run.
    """
    average = deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    path, first = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    # Updates, each with a step of the moving average
    started, shown, total, saved = time.time(), first, 0.0, time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += value.item()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) / (time.time() - started)
            print(f"{name} {step + 1}/{steps} loss {total / (step + 1 - shown):.4f} {rate:.2f} steps/s", flush=True)
            shown, total = step + 1, 0.0
        if step + 1 == steps or time.time() - saved > 90:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            save(average)
            saved = time.time()
    save(average)
    return average


def half(model: nn.Module) -> nn.Module:
    """Return a float16 copy, the precision of the shipped weights."""
    return deepcopy(model).half()
