"""Operations of attention by kernels that torch's counter does not know, or takes for others.

xformers computes attention in half precision by operators of its own, of which torch knows nothing, and in float32 by
torch's `_efficient_attention_*`, whose rows torch's counter takes for heads when they come so:

    dense    queries [B, M, H, K], keys [B, N, h, K], values [B, N, h, V]
    varlen   queries [.., sum of M, H, K] and so on, rows of any lengths side by side, with where each begins: [B + 1]

As torch counts: what a mask hides is counted, 2 operations a multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

Formula = Callable[..., int]  # of an operator's arguments, tensors as they are


def formulas() -> dict[Any, Formula]:
    """The formula of every such operator that there is by now: xformers has its own only once it is imported."""
    found: dict[Any, Formula] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
        torch.ops.aten._efficient_attention_forward: efficient_forward,
        torch.ops.aten._efficient_attention_backward: efficient_backward,
    }
    for name, formula in (("flash_fwd", flash_forward), ("flash_bwd", flash_backward)):
        operator = getattr(torch.ops.xformers_flash, name, None)
        if operator is not None:
            found[operator] = formula
    return found


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of `xformers_flash::flash_fwd`: the logits, and the mean of the values."""
    width = query.shape[-1] + value.shape[-1]
    return 2 * width * _logits(query, key, cu_seqlens_q, cu_seqlens_k)


def flash_backward(
    shared: bool,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of `xformers_flash::flash_bwd`: the logits again, the gradients of queries and keys, and two products of V."""
    width = 3 * query.shape[-1] + 2 * value.shape[-1]
    return 2 * width * _logits(query, key, cu_seqlens_q, cu_seqlens_k)


def efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of `aten::_efficient_attention_forward`."""
    return flash_forward(query, key, value, cu_seqlens_q, cu_seqlens_k)


def efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of `aten::_efficient_attention_backward`."""
    return flash_backward(False, grad, query, key, value, out, out, cu_seqlens_q, cu_seqlens_k)


def _logits(query: Tensor, key: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> int:
    """How many there are, of all heads of the queries."""
    heads = query.shape[-2]
    if starts_q is None or starts_k is None:
        return query.shape[0] * heads * query.shape[-3] * key.shape[-3]
    return heads * int((starts_q.diff().long() * starts_k.diff().long()).sum())


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]
