"""Meters for a training step: which part takes time and operations, how many bytes are alive, what is possible."""

from __future__ import annotations

import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmalign.benchmark.attention_operations import formulas
from mmalign.training.loop import Batches

PARTS = ("data", "noise", "reference", "policy", "backward", "optimizer", "rest")


class Meter:
    """Charges a growing quantity (seconds, operations) to one part of the step at a time."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read, self.total = read, dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "rest", read()

    def switch(self, part: str) -> None:
        """What has grown since the last switch belonged to the part before; from now on it belongs to `part`."""
        now = self.read()
        self.total[self._part] += now - self._since
        self._part, self._since = part, now


class Metered:
    """An object with a meter on some calls: {name: (part during the call, part afterwards)}."""

    def __init__(self, inner: Any, meter: Meter, calls: Mapping[str, tuple[str, str]]) -> None:
        self._inner, self._meter, self._calls = inner, meter, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._calls:
            return found
        during, afterwards = self._calls[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            self._meter.switch(during)
            result = found(*args, **kwargs)
            self._meter.switch(afterwards)
            return result

        return call


def metered_batches(batches: Batches, meter: Meter) -> Batches:
    """The same batches; making one is charged to "data"."""

    def wrapped(epoch: int, start: int) -> Iterator[Any]:
        batch, found = None, batches(epoch, start)
        while True:
            meter.switch("data")
            batch = next(found, None)
            meter.switch("rest")
            if batch is None:
                return
            yield batch

    return wrapped


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages alive that operations have touched: `live` now, `peak` at most, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self._seen = 0, 0, set[int]()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
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
    """Torch's counter of operations, of matrix products, convolutions and attention, that tells repetitions apart.

    It is taught the attention that it does not know (`attention_operations`). Where activations are checkpointed, the
    backward pass computes some of the forward pass again: these operations are counted in `repeated`, and not among the
    others.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.flop_registry = {**self.flop_registry, **formulas()}
        self.repeated = 0

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        # Inside of backward, gradients are on only where a part of the forward pass runs again.
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            formula: Any = self.flop_registry.get(packet)
            self.repeated += formula(*args, **kwargs, out_val=out) if formula is not None else 0
            return out
        return super()._count_flops(packet, out, args, kwargs)  # type: ignore[no-untyped-call]


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given; `clock` says of which kind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif "WORLD_SIZE" not in os.environ:
        return time.process_time()
    return time.perf_counter()


def clock(device: torch.device) -> str:
    """What `now` counts, for people, and whether runs take turns.

    On CPUs, which others may use as well, it is CPU time as in `loop.Progress`; but where processes were launched to
    work together, which wait for one another, it is that of the clock on the wall.
    """
    if device.type != "cpu":
        return "seconds are of the clock on the wall; each run is alone on the device, one after the other"
    if "WORLD_SIZE" not in os.environ:
        return "seconds are CPU seconds, of all threads together; runs take turns"
    return "seconds are of the clock on the wall, since processes wait for one another; runs take turns"


def peak_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations a second of a large matrix product: the most that is seen in at least `seconds` of them."""
    side, times = (8192, 20) if device.type == "cuda" else (1024, 2)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b  # the first one makes plans
    best, begun = 0.0, now(device)
    while now(device) - begun < seconds:
        started = now(device)
        for _ in range(times):
            a @ b
        best = max(best, times * 2 * side**3 / (now(device) - started))
    return best


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on, and by which clock, that of the device."""
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
        "clock": clock(device),
    }
