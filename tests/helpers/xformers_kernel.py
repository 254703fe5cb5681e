"""Stand-in for xformers' CUDA kernels: it refuses what they refuse, records its calls, and computes in float64.

The mask of a call is what xformers itself makes of its bias (`materialize`). The limits are those of the kernels' C++
code for GPUs with tensor cores (PyTorch's mem_eff_attention, `check_supported`) and of `not_supported_reasons`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.attention import BACKENDS
from mmalign.attention.backends import Mask, _in_one_dtype

ALIGNMENT = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}  # numbers of 16 bytes
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Call:
    """A call of `memory_efficient_attention`, with the kernels that take it forwards and backwards."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Any
    scale: float | None
    kernels: set[str]

    @property
    def visible(self) -> Tensor:
        """The mask [M, N] of a bias of xformers' own."""
        seen: Tensor = materialize(self.bias, self.query, self.key)[0, 0] == 0
        return seen


class Kernel:
    """In place of `memory_efficient_attention`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, scale: Any = None, op: Any = None
    ) -> Tensor:
        from xformers.ops import fmha

        inputs = fmha.Inputs(query=query, key=key, value=value, attn_bias=attn_bias, scale=scale)
        inputs.validate_inputs()
        for x in (query, key, value):
            refuse(x, query)
        if isinstance(attn_bias, Tensor):
            refuse_bias(attn_bias, query)
        known = [fmha.flash, fmha.cutlass] if op is None else [fmha.cutlass]
        both = {module.__name__.split(".")[-1]: (module.FwOp, module.BwOp) for module in known}
        names = {name for name, ops in both.items() if not any(reasons(one, inputs) for one in ops)}
        assert names, "no kernel takes the call"
        self.calls.append(Call(query.detach(), key.detach(), value.detach(), attn_bias, scale, names))
        logits = torch.einsum("bmhk,bnhk->bhmn", query.double(), key.double()) * inputs.scale_float
        weights = (logits + materialize(attn_bias, query, key)).softmax(-1)
        return torch.einsum("bhmn,bnhk->bmhk", weights, value.double()).to(query.dtype)


def reasons(operator: Any, inputs: Any) -> list[str]:
    """Return what an operator has against its inputs on any GPU."""
    here = ("device=cpu", "bf16 is only supported on A100+ GPUs")  # what is wrong with a CPU alone
    return [why for why in operator.not_supported_reasons(inputs) if not why.startswith(here)]


def refuse(x: Tensor, query: Tensor) -> None:
    """Assert the limits on queries, keys and values [B, M, H, K]."""
    assert x.dim() == 4 and x.dtype == query.dtype in ALIGNMENT, (x.shape, x.dtype, query.dtype)
    assert x.shape[-1] % 8 == 0 and x.shape[-1] <= LARGEST_HEAD, x.shape
    refuse_strides(x, ALIGNMENT[x.dtype])


def refuse_bias(bias: Tensor, query: Tensor) -> None:
    """Assert the limits on a bias [B, H, M, N]; finite, since a row of -inf makes NaN."""
    assert bias.dtype == query.dtype and not bias.requires_grad, (bias.dtype, query.dtype)
    assert bias.isfinite().all()
    refuse_strides(bias, ALIGNMENT[bias.dtype])


def refuse_strides(x: Tensor, alignment: int) -> None:
    *strides, last = [stride for stride, size in zip(x.stride(), (2, 2, 2, x.shape[-1]), strict=True) if size > 1]
    assert x.shape[-1] == 1 or last == 1, x.stride()
    assert not any(stride % alignment for stride in (*strides, x.storage_offset())), (x.shape, x.stride())


def materialize(bias: Any, query: Tensor, key: Tensor) -> Tensor:
    """Return the numbers added to the logits, [B, H, M, N] or 0."""
    if bias is None or isinstance(bias, Tensor):
        return query.new_zeros((), dtype=torch.float64) if bias is None else bias.double()
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    result: Tensor = bias.materialize(shape, dtype=torch.float64)
    return result


def compared(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **more: Any) -> Tensor:
    """Compute by xformers' backend, and compare the result with the plain formula in float64.

    They differ by one rounding to the result's dtype.
    """
    out = xformers_backend(q, k, v, mask, **more)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        wide = [x.double() for x in _in_one_dtype(q, k, v)]
        expected = BACKENDS["dense"](*wide, mask, **more)
    assert out.dtype == _in_one_dtype(q, k, v)[0].dtype
    assert (out.double() - expected).abs().max() <= torch.finfo(out.dtype).eps * expected.abs().max()
    return out


xformers_backend = BACKENDS["xformers"]
