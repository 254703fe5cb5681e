"""Precisions that a device computes in by itself, and those that it emulates."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def warn_if_emulated(key: str, precision: str, device: torch.device) -> None:
    """Warn that the precision that the user named at `key` is many times slower than float32 on this device."""
    if precision == "bfloat16" and not computes_bfloat16(device):
        logger.warning(
            f"warning: {key}: this {device.type} has no instructions for bfloat16, which makes it many times slower "
            "than float32; use float32"
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16.

    GPUs before Ampere and x86 without AVX-512 emulate them; with AVX2 a product of matrices took 93 times as long as in
    float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")
