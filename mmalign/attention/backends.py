"""Attention backends: xformers' kernels, PyTorch's SDPA, and a dense reference for tests.

B rows, M queries, N keys, H heads of dimension K. Queries are [B, M, H, K], keys and values [B, N, H, K], the result
[B, M, H, K]: xformers' layout, and that of linear layers. Keys and values may have fewer heads than the queries
(grouped-query attention).

A mask is a `PackedPrefixMask` (one row, M = N = L), or a tensor that expands to [B, H, M, N]: either bool, true where a
query sees a key, or numbers added to the logits. `causal` requires M = N, and no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.attention.packed_mask import BlockGroup, PackedPrefixMask

if TYPE_CHECKING:
    from xformers.ops import AttentionBias

Mask = PackedPrefixMask | Tensor | None


class Backend(Protocol):
    """An attention function."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """Return softmax(scale * q k^T, masked) v; `scale` defaults to 1 / sqrt(K)."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it selects its kernels in Python
def xformers(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Compute attention with xformers' `memory_efficient_attention`, which runs on CUDA only.

    A packed mask's shared keys are repeated for each branch, so that its blocks are diagonal. With PyTorch's
    deterministic algorithms on, the CUTLASS kernels run, whose backward pass is deterministic.
    """
    from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention

    q, k, v = _in_one_dtype(q, k, v)
    operators = (fmha.cutlass.FwOp, fmha.cutlass.BwOp) if torch.are_deterministic_algorithms_enabled() else None

    def run(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias | Tensor | None) -> Tensor:
        k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale, op=operators)
        return out

    if isinstance(mask, PackedPrefixMask):
        return attend_by_group(lambda group, q, k, v: run(q, k, v, group.bias), q, k, v, mask)
    return run(q, k, v, LowerTriangularMask() if causal else None if mask is None else _padded_bias(mask, q, k))


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Compute attention with PyTorch's `scaled_dot_product_attention`; a packed mask's blocks run one by one."""
    k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
    if not isinstance(mask, PackedPrefixMask):
        return _sdpa(q, k, v, mask, causal, scale)
    _check_row(q, mask)
    # Each block's queries [B, M', H, K] against the keys that they see
    outputs = []
    for block in mask.blocks:
        keys, values = (_select(x, block.keys) for x in (k, v))
        queries, num_earlier = q[:, slice(*block.queries)], block.num_keys - block.num_queries
        # SDPA's own flag counts from the first key, so it serves only queries that begin there
        causal, visible = block.causal and not num_earlier, None
        if block.causal and num_earlier:
            visible = torch.ones(block.num_queries, block.num_keys, dtype=torch.bool, device=q.device).tril(num_earlier)
        outputs.append(_sdpa(queries, keys, values, visible, causal, scale))
    return torch.cat(outputs, 1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Compute attention by its formula over all pairs of tokens, in float32 or float64; for tests."""
    dtype = _in_one_dtype(q, k, v)[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Inputs rounded as a backend gets them; all sums in the wide dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(dtype).to(wide) for x in (q, k, v))
        k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
        logits = torch.einsum("bmhk,bnhk->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        # Any mask as numbers added to the logits [B, H, M, N]
        if isinstance(mask, PackedPrefixMask):
            _check_row(q, mask)
            mask = mask.visible.to(q.device)
        elif causal:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            logits = logits + _as_bias(mask, wide)
        return torch.einsum("bhmn,bnhk->bmhk", logits.softmax(-1), v).to(dtype)


BACKENDS: dict[str, Backend] = {"xformers": xformers, "sdpa": sdpa, "dense": dense}


def attend_by_group(
    run: Callable[[BlockGroup, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_mask: PackedPrefixMask,
) -> Tensor:
    """Compute a packed mask's attention with one call of `run` per block group, and join the results."""
    _check_row(q, packed_mask)
    groups = packed_mask.block_groups(q.device)
    outputs = [run(group, group.queries(q), group.keys(k), group.keys(v)) for group in groups]
    if len(groups) == 1:
        return outputs[0]
    # Each token is in one group, and 0 in the others' outputs.
    return torch.stack([group.queries.put(out) for group, out in zip(groups, outputs, strict=True)]).sum(0)


def _select(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return a row's tokens in the ranges; a single range is a view, not a copy."""
    parts = [x[:, slice(*bounds)] for bounds in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _check_row(q: Tensor, packed_mask: PackedPrefixMask) -> None:
    if q.shape[:2] != (1, packed_mask.length):
        raise ValueError(
            f"attention: expected 1 row of the packed mask's {packed_mask.length} tokens, got {q.shape[0]} of "
            f"{q.shape[1]}"
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of keys or values to the number of the queries' heads, as xformers' gradients need."""
    times = q.shape[2] // x.shape[2]
    return x if times == 1 else x.unsqueeze(3).expand(*x.shape[:3], times, x.shape[3]).flatten(2, 3)


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Convert to autocast's dtype, since autocast does not cover xformers; without autocast, to the values' dtype.

    Norms and rotary embeddings return float32 queries and keys, although the values are in half precision.
    """
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[-1].dtype
    return [x.to(dtype) for x in tensors]


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to numbers added to logits; finite, since -inf gives NaN for a padding token that sees no key."""
    if mask.dtype != torch.bool:
        assert mask.is_floating_point(), f"a mask is bool or floating point, not {mask.dtype}"
        return mask.to(dtype).clamp(min=torch.finfo(dtype).min)  # float32's least number is -inf in half precision
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _padded_bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Convert a mask to xformers' form: [B, H, M, N] in the queries' dtype, with strides that are multiples of 8."""
    num_keys = k.shape[1]
    wide = F.pad(_as_bias(mask, q.dtype).expand(*mask.shape[:-1], num_keys), (0, -num_keys % 8))
    return wide.expand(q.shape[0], q.shape[2], q.shape[1], -1)[..., :num_keys]
