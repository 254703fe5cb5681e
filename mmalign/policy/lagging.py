"""Copies of a policy's trained weights that follow them: its moving average, a moving reference, an old policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LaggingCopy:
    """Copy of parameters in float32 that moves towards them after every update.

    `share` maps the number of an update, the first of which is 1, to the parameters' share in the copy after it:
    copy <- (1 - share) copy + share parameters.

    Attributes:
        caught_up: true if the copy is known to equal the parameters: at first, and after an update with the share 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], share: Callable[[int], float]) -> None:
        self.share = share
        self.weights = [p.detach().float().clone() for p in parameters]
        self.caught_up = True

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Move towards the parameters after update number `step`."""
        share = self.share(step)
        self.caught_up = share == 1
        if share:
            torch._foreach_lerp_(self.weights, [p.detach().float() for p in parameters], share)

    @torch.no_grad()
    def swap(self, parameters: Sequence[nn.Parameter]) -> None:
        """Swap the copy and the parameters; a second call swaps them back, unseen by a backward pass."""
        for copied, parameter in zip(self.weights, parameters, strict=True):
            saved = parameter.detach().clone()
            parameter.data.copy_(copied)
            copied.copy_(saved)

    @contextmanager
    def swapped(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Swap the copy and the parameters, and back on exit, even after an error."""
        self.swap(parameters)
        try:
            yield
        finally:
            self.swap(parameters)

    def load(self, weights: Sequence[Tensor]) -> None:
        """Load the copy of a checkpoint."""
        self.caught_up = False  # not known; the next update may tell
        for weight, saved in zip(self.weights, weights, strict=True):
            weight.copy_(saved)


def mixed_share(step: int, *, every: int, mix: float, ramp: float | None, flat: int) -> float:
    """Return the policy's share in a copy after update `step`.

    It is `mix` after every `every` updates. With a ramp it falls from 1 to `mix`: by `ramp` an update, after `flat`
    updates at 1. That is the decay min(ramp n, 1 - mix) of DiffusionNFT (arXiv:2509.16117).
    """
    if step % every:
        return 0.0
    return mix if ramp is None else max(mix, 1 - ramp * max(0, step - flat))
