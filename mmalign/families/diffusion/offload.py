"""Offloading of a pipeline's networks: what a stage does not use is on the CPU (`model.offload`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

CPU = torch.device("cpu")


def place(networks: Sequence[nn.Module], used: Sequence[nn.Module], device: torch.device) -> None:
    """Move the networks in use to the device, after all others have left it."""
    for net in networks:
        if all(net is not other for other in used):
            net.to(CPU)
    for net in used:
        net.to(device)


@contextmanager
def stages(networks: Sequence[nn.Module], device: torch.device | None) -> Iterator[Callable[..., None]]:
    """Yield a function that begins a stage with the networks in use; in the end all are back where they were.

    Without a device the function does nothing.
    """
    homes = [next(net.parameters()).device for net in networks]
    try:
        yield lambda *used: place(networks, used, device) if device is not None else None
    finally:
        if device is not None:
            # Networks that return to the CPU go first, to make room
            for net, home in sorted(zip(networks, homes, strict=True), key=lambda item: item[1] != CPU):
                net.to(home)
