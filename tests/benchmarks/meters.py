"""Meters for a training step: which part takes the time or the operations, and how many bytes are alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmalign.loop import Batches

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


def flop_counter() -> FlopCounterMode:
    """Torch's, which knows fused attention on CUDA, taught that of the CPU."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
