"""Who computes attention: xformers' kernels, PyTorch's own, or a plain reference that both must agree with.

B rows, M queries, N keys, H heads of K numbers (keys and values may have fewer heads, each for several of the
queries'). Queries [B, M, H, K], keys and values [B, N, H, K], the result [B, M, H, K]: xformers' layout, and that of
linear layers before their heads are moved.

A mask is a `PackedPrefixMask` (one row, M = N = L), or a tensor that expands to [B, H, M, N]: bool, true where a query
sees a key, or else numbers that are added to the logits. `causal` is for M = N, without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attention.forest import BlockGroup, PackedPrefixMask

if TYPE_CHECKING:
    from xformers.ops import AttentionBias

Mask = PackedPrefixMask | Tensor | None


class Backend(Protocol):
    """Computes attention."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """softmax(scale * q k^T, masked) v; `scale` is 1 / sqrt(K) if not given."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it chooses its kernels in Python
def xformers(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """See Executor: xformers' `memory_efficient_attention`, which runs on CUDA alone.

    Keys that a forest shares are laid out once for each branch, so that its blocks are diagonal. Where PyTorch is asked
    for deterministic algorithms it is the CUTLASS kernels, whose backward pass has an order.
    """
    from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention

    q, k, v = _in_one_dtype(q, k, v)
    ordered = (fmha.cutlass.FwOp, fmha.cutlass.BwOp) if torch.are_deterministic_algorithms_enabled() else None

    def run(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias | Tensor | None) -> Tensor:
        k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale, op=ordered)
        return out

    if isinstance(mask, PackedPrefixMask):
        return attend_by_group(lambda group, q, k, v: run(q, k, v, group.bias), q, k, v, mask)
    return run(q, k, v, LowerTriangularMask() if causal else None if mask is None else _added(mask, q, k))


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """See Executor: PyTorch's `scaled_dot_product_attention`, which runs anywhere; a forest's blocks one by one."""
    k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
    if not isinstance(mask, PackedPrefixMask):
        return _sdpa(q, k, v, mask, causal, scale)
    _check_row(q, mask)
    outputs = []
    for block in mask.blocks:
        keys, values = (_parts(x, block.keys) for x in (k, v))
        queries, more = q[:, slice(*block.queries)], block.num_keys - block.num_queries
        causal, seen = block.causal and not more, None
        if block.causal and more:
            seen = torch.ones(block.num_queries, block.num_keys, dtype=torch.bool, device=q.device).tril(more)
        outputs.append(_sdpa(queries, keys, values, seen, causal, scale))
    return torch.cat(outputs, 1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """See Executor: the formula as it stands, in float32 or better, with every pair of tokens. For tests."""
    dtype = _in_one_dtype(q, k, v)[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(dtype).to(wide) for x in (q, k, v))
        k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
        logits = torch.einsum("bmhk,bnhk->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if isinstance(mask, PackedPrefixMask):
            _check_row(q, mask)
            mask = mask.visible.to(q.device)
        elif causal:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            logits = logits + _numbers(mask, wide)
        return torch.einsum("bhmn,bnhk->bmhk", logits.softmax(-1), v).to(dtype)


BACKENDS: dict[str, Backend] = {"xformers": xformers, "sdpa": sdpa, "dense": dense}


def attend_by_group(
    run: Callable[[BlockGroup, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_mask: PackedPrefixMask,
) -> Tensor:
    """A forest's attention by calls that run all blocks of a kind: each with its queries and keys side by side."""
    _check_row(q, packed_mask)
    groups = packed_mask.block_groups(q.device)
    outputs = [run(group, group.queries(q), group.keys(k), group.keys(v)) for group in groups]
    if len(groups) == 1:
        return outputs[0]
    # No token is in two groups: what each leaves at 0, another fills.
    return torch.stack([group.queries.put(out) for group, out in zip(groups, outputs, strict=True)]).sum(0)


def _parts(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Tokens of a row; where they stand side by side, without a copy."""
    parts = [x[:, slice(*one)] for one in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _check_row(q: Tensor, packed_mask: PackedPrefixMask) -> None:
    if q.shape[:2] != (1, packed_mask.length):
        raise ValueError(
            f"attention: a forest of {packed_mask.length} tokens is one row of as many, got {q.shape[0]} of "
            f"{q.shape[1]}"
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with a head for every head of the queries: no kernel of xformers has gradients for fewer."""
    times = q.shape[2] // x.shape[2]
    return x if times == 1 else x.unsqueeze(3).expand(*x.shape[:3], times, x.shape[3]).flatten(2, 3)


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """As autocast would have it, which knows nothing of xformers; else in the dtype of the last, the values.

    Norms of queries and keys, and rotations, leave float32 where the values are in half precision.
    """
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[-1].dtype
    return [x.to(dtype) for x in tensors]


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to logits. Not minus infinity, which makes NaN of a padding token that sees nothing."""
    if mask.dtype != torch.bool:
        assert mask.is_floating_point(), f"a mask is bool or what is added to logits, not {mask.dtype}"
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _added(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as xformers takes it: [B, H, M, N] in the queries' dtype, each row of it at a multiple of 8 numbers."""
    num_keys = k.shape[1]
    wide = F.pad(_numbers(mask, q.dtype).expand(*mask.shape[:-1], num_keys), (0, -num_keys % 8))
    return wide.expand(q.shape[0], q.shape[2], q.shape[1], -1)[..., :num_keys]
