"""Rows that share a prefix: worked out by hand, and for random lengths against the mask's definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.attention import BACKENDS, Backend, PackedPrefixMask, PrefixGroup
from mmalign.attention.backends import attend_by_group
from mmalign.attention.packed_mask import BlockGroup, RangeGather
from tests.helpers.packed_masks import random_mask

SMALL = PackedPrefixMask((PrefixGroup(2, (1, 2)), PrefixGroup(1, (1,))))
# Rows of the hand-written masks: a letter for each token that is seen.
LETTERS = "PQaxyRb"  # the first tree's prefix PQ, its branches a and xy; the second's R and b
CAUSAL = ["P", "PQ", "PQa", "PQx", "PQxy", "R", "Rb"]


def by_hand(rows: list[str]) -> Tensor:
    return torch.tensor([[letter in row for letter in LETTERS] for row in rows])


def by_definition(packed_mask: PackedPrefixMask) -> Tensor:
    """The mask token by token: of the same tree, in the prefix or in the same branch, and not later."""
    tokens = [
        (number, branch, place)
        for number, group in enumerate(packed_mask.prefix_groups)
        for branch, length in [(-1, group.prefix), *enumerate(group.branches)]
        for place in range(length)
    ]

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        if query[0] != key[0] or key[1] not in (-1, query[1]):
            return False
        free = packed_mask.prefix_groups[query[0]].bidirectional_prefix and query[1] == -1
        return key[1] != query[1] or free or key[2] <= query[2]

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def test_a_small_row_by_hand() -> None:
    assert SMALL.length == 7
    assert SMALL.longest == 4
    assert SMALL.visible.equal(by_hand(CAUSAL))
    assert SMALL.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert SMALL.target_positions.tolist() == [2, 3, 4, 6]
    assert SMALL.predictor_positions.tolist() == [1, 1, 3, 5]  # a and x are said after Q, y after x, b after R


def test_a_prefix_that_sees_both_ways_by_hand() -> None:
    packed_mask = PackedPrefixMask((PrefixGroup(2, (1, 2), bidirectional_prefix=True), PrefixGroup(1, (1,))))
    assert packed_mask.visible.equal(by_hand(["PQ", "PQ", *CAUSAL[2:]]))


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_its_definition(seed: int) -> None:
    packed_mask = random_mask(seed)
    assert packed_mask.visible.equal(by_definition(packed_mask))
    assert sum(block.num_queries for block in packed_mask.blocks) == packed_mask.length


def test_rows_are_joined_and_split_again() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5]), torch.tensor([6, 7])]
    packed = SMALL.join(rows)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert [row.tolist() for row in SMALL.split(packed)] == [row.tolist() for row in rows]
    wide = SMALL.join([torch.stack([row, -row]) for row in rows])  # as M-RoPE's three lines of positions
    assert wide.tolist() == [packed.tolist(), (-packed).tolist()]
    assert SMALL.split(packed[None, :, None].expand(1, 7, 3), dim=1)[1].shape == (1, 4, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PrefixGroup(0, (1,)),
        lambda: PrefixGroup(1, ()),
        lambda: PrefixGroup(1, (2, 0)),
        lambda: PackedPrefixMask(()),
    ],
)
def test_what_is_no_row_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        wrong()


def test_packing_refuses_rows_of_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"expected rows of \[3, 4, 2\] tokens, got \[3, 4, 3\]"):
        SMALL.join([torch.zeros(3), torch.zeros(4), torch.zeros(3)])
    q = torch.zeros(2, 7, 1, 8)
    for name in ("sdpa", "dense"):
        with pytest.raises(ValueError, match="expected 1 row of the packed mask's 7 tokens, got 2 of 7"):
            BACKENDS[name](q, q, q, SMALL)


def run(
    backend: Backend,
    packed_mask: PackedPrefixMask,
    heads: int = 4,
    key_heads: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The result and the gradients to queries, keys and values, at random values."""
    draw = torch.Generator().manual_seed(1)
    q, k, v, weight = (
        torch.randn(1, packed_mask.length, number, 8, generator=draw, dtype=dtype)
        for number in (heads, key_heads, key_heads, heads)
    )
    given = [x.requires_grad_() for x in (q, k, v)]
    out = backend(*given, packed_mask)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given)]


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, causal: bool = False, scale: Any = None) -> Tensor:
    """Compute by the reference the blocks that xformers gets, side by side over gathered keys."""

    def attend(group: BlockGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        row = column = 0
        for queries, keys in zip(group.num_queries, group.num_keys, strict=True):
            full = torch.ones(queries, keys, dtype=torch.bool)
            block = full.tril(keys - queries) if group.causal else full
            seen[row : row + queries, column : column + keys] = block
            row, column = row + queries, column + keys
        return BACKENDS["dense"](q, k, v, seen, scale=scale)

    return attend_by_group(attend, q, k, v, mask)


# float64: backends add the same numbers in another order.
@pytest.mark.parametrize("backend", [BACKENDS["sdpa"], grouped], ids=["sdpa", "grouped"])
@pytest.mark.parametrize("seed", range(12))
def test_backends_agree_with_the_reference(backend: Backend, seed: int) -> None:
    packed_mask = random_mask(seed)
    for actual, plain in zip(run(backend, packed_mask), run(BACKENDS["dense"], packed_mask), strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sdpa", "dense"])
def test_a_packed_row_is_its_rows_apart(name: str) -> None:
    packed_mask = random_mask(5)
    q, k, v = (torch.randn(1, packed_mask.length, 2, 8, dtype=torch.float64) for _ in range(3))
    packed = packed_mask.split(BACKENDS[name](q, k, v, packed_mask), dim=1)
    apart = zip(*(packed_mask.split(x, dim=1) for x in (q, k, v)), strict=True)
    trees = [group for group in packed_mask.prefix_groups for _ in group.branches]
    for actual, row, group in zip(packed, apart, trees, strict=True):
        seen = torch.ones(row[0].shape[1], row[0].shape[1], dtype=torch.bool).tril()
        if group.bidirectional_prefix:
            seen[: group.prefix, : group.prefix] = True
        torch.testing.assert_close(actual, BACKENDS["dense"](*row, seen), rtol=1e-11, atol=1e-12)


def test_comparison_notices_another_mask() -> None:
    packed_mask = PackedPrefixMask((PrefixGroup(3, (2, 2)),))
    wrong = torch.ones(7, 7, dtype=torch.bool).tril()  # the second branch sees the first
    q = torch.randn(1, 7, 2, 8, dtype=torch.float64)
    actual, expected = BACKENDS["sdpa"](q, q, q, packed_mask), BACKENDS["dense"](q, q, q, wrong)
    torch.testing.assert_close(actual[:, :5], expected[:, :5])
    assert (actual[:, 5:] - expected[:, 5:]).abs().max() > 0.01


def test_gradients_go_back_through_a_pick_in_their_own_order() -> None:
    pick = RangeGather([(0, 3), (1, 2), (0, 2), (4, 5)], 5, torch.device("cpu"))  # tokens 0 1 2 1 0 1 4
    x = torch.arange(5.0)[None, :, None].requires_grad_()
    assert pick(x).flatten().tolist() == [0, 1, 2, 1, 0, 1, 4]
    (back,) = torch.autograd.grad(pick(x), x, torch.tensor([1.0, 2, 4, 8, 16, 32, 64])[None, :, None])
    assert back.flatten().tolist() == [17, 42, 4, 0, 64]


@pytest.mark.parametrize("take", [True, False])
def test_a_pick_has_right_gradients(take: bool) -> None:
    pick = RangeGather([(1, 3), (0, 2)], 4, torch.device("cpu"))
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pick if take else pick.put, (x,))


def test_a_row_in_order_is_not_copied() -> None:
    x = torch.randn(1, 5, 2)
    pick = RangeGather([(0, 3), (3, 5)], 5, torch.device("cpu"))
    assert pick(x) is x
