"""Low-rank adapters on a diffusers network (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers' own preference scripts adapt


def add_lora(net: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put adapters of a rank on the linear layers whose names end in `targets`; their weights are float32 masters.

    A Gaussian first matrix and a zero second one: the network's outputs are unchanged at first. No dropout, which
    would make the policy differ from its reference by chance.

    Raises:
        ValueError: no layer of the network has one of these names.
    """
    from peft import LoraConfig

    # The library goes on if one name of several is found, and the others' layers would silently not be trained.
    known = [name for name, _ in net.named_modules()]
    lost = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in known)]
    if lost or not targets:
        raise ValueError(
            f"model.lora.targets: no layer of {type(net).__name__} ends in {', '.join(lost) or 'nothing'}; expected "
            f"ends of its layers' names, such as {', '.join(ATTENTION)}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            net.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"model.lora.targets: {', '.join(targets)} cannot be adapted: {error}") from error
    for parameter in net.parameters():
        if parameter.requires_grad:
            # Half-precision weights would lose updates of 1e-5.
            parameter.data = parameter.data.float()
