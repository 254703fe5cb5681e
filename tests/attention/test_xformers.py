"""Calls of xformers' kernels: their masks are the reference's, and a kernel with gradients takes each of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import BACKENDS, PackedPrefixMask, PrefixGroup
from mmalign.attention.backends import Mask
from tests.helpers.packed_masks import random_mask
from tests.helpers.xformers_kernel import Kernel, xformers_backend

CAUSAL = PackedPrefixMask((PrefixGroup(9, (4, 3, 6)), PrefixGroup(5, (2,))))
MIXED = PackedPrefixMask((PrefixGroup(9, (4, 3)), PrefixGroup(5, (2, 8), bidirectional_prefix=True)))
ALONE = PackedPrefixMask((PrefixGroup(9, (4,)), PrefixGroup(5, (2,))))  # nothing is shared, and nothing laid out anew
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def numbered(length: int, role: int) -> Tensor:
    """Return [1, L, 2, 8] whose first numbers are a token's index in two digits and a role, exact in any dtype."""
    x = torch.randn(1, length, 2, 8)
    index = torch.arange(length)
    x[..., 0], x[..., 1], x[..., 2] = (index // 32)[:, None], (index % 32)[:, None], role
    return x


def tokens(x: Tensor, role: int) -> Tensor:
    """Return the indices of the tokens [L] that a call was given in that role."""
    assert (x[..., 2] == role).all()
    return (32 * x[0, :, 0, 0] + x[0, :, 0, 1]).long()


@pytest.mark.slow
def test_kernels_see_the_reference_mask_of_200_forests(kernel: Kernel) -> None:
    """Queries, keys and values are marked, so that a call tells which tokens of the row it was given, and as what.

    The backend's result is compared as well: it has the tokens' order.
    """
    kinds = set()
    for seed in range(200):
        packed_mask, dtype = random_mask(seed), DTYPES[seed % 3]
        q, k = (numbered(packed_mask.length, role).to(torch.float32 if seed % 2 else dtype) for role in (1, 2))
        BACKENDS["xformers"](q, k, numbered(packed_mask.length, 3).to(dtype), packed_mask, scale=0.05)
        times = torch.zeros(packed_mask.length, packed_mask.length, dtype=torch.long)
        for call in kernel.calls:
            rows, columns = tokens(call.query, 1), tokens(call.key, 2)
            assert tokens(call.value, 3).equal(columns)
            assert {call.query.dtype, call.key.dtype, call.value.dtype} == {dtype} and call.scale == 0.05
            times.index_put_((rows[:, None], columns[None]), call.visible.long(), accumulate=True)
            kinds.add(type(call.bias).__name__)
        assert times.equal(packed_mask.visible.long()), seed  # each key is seen once
        kernel.calls.clear()
    assert kinds == {"BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"}


def result(name: str, mask: Mask, heads: tuple[int, int], lengths: tuple[int, int], **more: Any) -> list[Tensor]:
    """The result and the gradients to queries, keys and values, of one row or of two."""
    draw, rows = torch.Generator().manual_seed(0), 1 if isinstance(mask, PackedPrefixMask) else 2
    (of_queries, of_keys), (queries, keys) = heads, lengths
    shapes = [(queries, of_queries), (keys, of_keys), (keys, of_keys), (queries, of_queries)]
    q, k, v, weight = (torch.randn(rows, length, number, 8, generator=draw) for length, number in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = BACKENDS[name](*inputs, mask, **more)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


OTHER_MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda queries, keys: None,
    "padding": lambda queries, keys: (
        torch.arange(keys).expand(2, 1, 1, keys) < torch.tensor([2, keys])[:, None, None, None]
    ),
    "of each query": lambda queries, keys: torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(1),
    "nothing seen": lambda queries, keys: torch.zeros(2, 1, queries, keys, dtype=torch.bool),
    "added": lambda queries, keys: torch.randn(2, 4, queries, keys, generator=torch.Generator().manual_seed(1)),
    "added to one head": lambda queries, keys: torch.full((1, 1, 1, keys), -10000.0).index_fill(3, torch.tensor(0), 0),
    "minus infinity": lambda queries, keys: torch.full((2, 1, queries, keys), -torch.inf).index_fill(
        2, torch.tensor(0), 0
    ),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed_mask", [CAUSAL, MIXED, ALONE])
def test_packed_rows_equal_the_reference(packed_mask: PackedPrefixMask, heads: tuple[int, int], kernel: Kernel) -> None:
    lengths = (packed_mask.length,) * 2
    fast, plain = (result(name, packed_mask, heads, lengths, scale=0.4) for name in ("xformers", "dense"))
    for actual, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # float32
    assert all(call.query.shape == call.key.shape[:1] + call.query.shape[1:2] + (4, 8) for call in kernel.calls)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [(5, 5), (16, 77), (1, 9)])
@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_other_rows_equal_the_reference(
    kind: str, lengths: tuple[int, int], heads: tuple[int, int], kernel: Kernel
) -> None:
    mask = OTHER_MASKS[kind](*lengths)
    fast, plain = (result(name, mask, heads, lengths) for name in ("xformers", "dense"))
    for actual, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert [call.key.shape for call in kernel.calls] == [(2, lengths[1], 4, 8)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_causal_rows_equal_the_reference(heads: tuple[int, int], kernel: Kernel) -> None:
    fast, plain = (result(name, None, heads, (7, 7), causal=True) for name in ("xformers", "dense"))
    for actual, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_float32_fits_any_dtype(dtype: torch.dtype, kernel: Kernel) -> None:
    """The least float32 is -inf in the half precisions, and a row of it would be NaN."""
    q = torch.randn(2, 5, 4, 8, dtype=dtype)
    out = xformers_backend(q, q, q, torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min))
    assert out.isfinite().all() and kernel.calls[0].bias.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 32, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("ordered", [False, True])
def test_every_mask_has_a_kernel_with_gradients(
    dtype: torch.dtype, size: int, ordered: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: ordered)
    text = torch.ones(1, 1, 1, 77, dtype=torch.bool)  # 77 is no multiple of 8
    for mask in (CAUSAL, MIXED, ALONE, text, None):
        length = mask.length if isinstance(mask, PackedPrefixMask) else 16
        q = torch.zeros(1, length, 4, size, dtype=dtype)
        k = torch.zeros(1, 77 if mask is text else length, 2, size, dtype=dtype)
        BACKENDS["xformers"](q, k, k, mask)
        assert all("cutlass" in call.kernels for call in kernel.calls), mask
        if mask is not text and dtype != torch.float32 and not ordered:
            assert all("flash" in call.kernels for call in kernel.calls), mask
        kernel.calls.clear()


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": torch.zeros(1, 6, 2, 12)},  # a head of 12 numbers
        {"query": torch.zeros(1, 6, 2, 264)},
        {"query": torch.zeros(1, 6, 8, 2).transpose(2, 3)},  # a head's numbers lie apart
        {"query": torch.zeros(1, 6, 2, 9)[..., :8]},  # rows of 9 numbers
        {"value": torch.zeros(1, 6, 2, 8, dtype=torch.float16)},
        {"attn_bias": torch.zeros(1, 2, 6, 6)},  # rows of 6 numbers
        {"attn_bias": torch.zeros(1, 1, 6, 8)[..., :6]},  # one head of two
        {"attn_bias": torch.zeros(1, 2, 6, 8, dtype=torch.float16)[..., :6]},
        {"attn_bias": torch.zeros(1, 2, 6, 8, requires_grad=True)[..., :6]},
        {"attn_bias": torch.full((1, 2, 6, 8), -torch.inf)[..., :6]},
    ],
)
def test_the_stand_in_refuses_what_kernels_refuse(wrong: dict[str, Tensor], kernel: Kernel) -> None:
    x = next(iter(wrong.values()))
    same = x if "query" in wrong else torch.zeros(1, 6, 2, 8)
    with pytest.raises((AssertionError, ValueError)):
        kernel(**{"query": same, "key": same, "value": same, **wrong})
    kernel(*[torch.zeros(1, 6, 2, 8)] * 3)
