"""Meters for the time, operations and memory of a training step, and for the peak rate of a device."""

from __future__ import annotations

import os
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from mmalign.reading.weights import plain_tensors

PARTS = ("data", "noise", "reference", "policy", "backward", "optimizer", "rest")


class Meter:
    """Meter of a growing quantity (seconds, operations), charged to one part of the step at a time."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read, self.totals = read, dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "rest", read()

    def switch(self, part: str) -> None:
        """Charge the growth since the last switch to the current part, and begin `part`."""
        value = self.read()
        self.totals[self._part] += value - self._since
        self._part, self._since = part, value


class Metered:
    """Wrapper with a meter on some calls of an object: {name: (part during the call, part afterwards)}."""

    def __init__(self, inner: Any, meter: Meter, calls: Mapping[str, tuple[str, str]]) -> None:
        self._inner, self._meter, self._calls = inner, meter, calls

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if name not in self._calls:
            return attribute
        during, afterwards = self._calls[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            self._meter.switch(during)
            result = attribute(*args, **kwargs)
            self._meter.switch(afterwards)
            return result

        return call


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the bytes of all live storages that operations touched: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self._seen = 0, 0, set[int]()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed; of a quantized tensor those inside."""
        for inner in plain_tensors(tensor):
            self._count(inner)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # By storage: views share their bytes
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out


class Operations(FlopCounterMode):
    """Counter of operations by torch (matrix products, convolutions, attention), with more attention kernels.

    With gradient checkpointing the backward pass repeats parts of the forward pass. `repeated` alone counts these
    operations.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.flop_registry = {**self.flop_registry, **attention_formulas()}
        self.repeated = 0

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        # Inside backward, gradients are on only while a part of the forward pass is repeated.
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            formula: Any = self.flop_registry.get(packet)
            self.repeated += formula(*args, **kwargs, out_val=out) if formula is not None else 0
            return out
        return super()._count_flops(packet, out, args, kwargs)  # type: ignore[no-untyped-call]


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas of attention kernels that torch's counter lacks, or reads in another layout.

    The counter lacks the CPU kernel of `scaled_dot_product_attention`, and xformers' operators, which exist once
    xformers is imported. It mistakes rows of `_efficient_attention_*`, which xformers calls in float32, for heads. As
    in torch's formulas, masked logits are included, and a multiplication is 2 operations.
    """
    aten, xformers = torch.ops.aten, torch.ops.xformers_flash
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
        aten._efficient_attention_forward: lambda q, k, v, bias, *starts, **_: forward(q, k, v, *starts[:2]),
        aten._efficient_attention_backward: lambda _, q, k, v, bias, out, *starts, **__: backward(q, k, v, *starts[:2]),
    }
    if hasattr(xformers, "flash_fwd"):
        formulas[xformers.flash_fwd] = lambda q, k, v, *starts, **_: forward(q, k, v, *starts[:2])
    if hasattr(xformers, "flash_bwd"):
        formulas[xformers.flash_bwd] = lambda _, grad, q, k, v, out, lse, *starts, **__: backward(q, k, v, *starts[:2])
    return formulas


def forward(query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> int:
    """Return the operations of attention's forward pass: the logits, and the weighted mean of the values."""
    return 2 * (query.shape[-1] + value.shape[-1]) * _count_logits(query, key, starts_q, starts_k)


def backward(query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> int:
    """Return the operations of attention's backward pass: logits, query and key gradients, two products of values."""
    return 2 * (3 * query.shape[-1] + 2 * value.shape[-1]) * _count_logits(query, key, starts_q, starts_k)


def _count_logits(query: Tensor, key: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> int:
    """Count the logits of queries [B, M, H, K] and keys [B, N, h, K], in all H heads.

    With starts [B + 1], rows of any length lie side by side: [..., sum of M, H, K] and [..., sum of N, h, K].
    """
    heads = query.shape[-2]
    if starts_q is None or starts_k is None:
        return query.shape[0] * heads * query.shape[-3] * key.shape[-3]
    return heads * int((starts_q.diff().long() * starts_k.diff().long()).sum())


def now(device: torch.device) -> float:
    """Return the seconds of the device's clock, after it has finished its work.

    A CPU may have other work, so its seconds are CPU time, as in `loop.Progress`. Processes of one launch wait for one
    another, so their seconds are wall-clock time.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif "WORLD_SIZE" not in os.environ:
        return time.process_time()
    return time.perf_counter()


def peak_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the highest rate of a large matrix product in at least `seconds`, in operations per second."""
    side, times = (8192, 20) if device.type == "cuda" else (512, 4)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b  # the first product chooses kernels
    best, begun = 0.0, now(device)
    while now(device) - begun < seconds:
        started = now(device)
        for _ in range(times):
            a @ b
        best = max(best, times * 2 * side**3 / (now(device) - started))
    return best


def machine(device: torch.device) -> dict[str, str | int | float]:
    """Describe the machine, the versions and the clock of the measurements."""
    cpu_time = device.type == "cpu" and "WORLD_SIZE" not in os.environ
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "seconds": "CPU time of all threads" if cpu_time else "wall clock",
    }
