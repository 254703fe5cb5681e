"""Which tokens see which in a row that several responses share: forests of [prefix | branch | branch ...].

A tree is one sample: an image with its prompt once (the prefix), and after it any number of responses (the branches).
A token of a branch sees the prefix and its own branch up to itself, as if the two stood alone in a row; branches, and
trees, see nothing of each other. A row holds any number of trees one after the other, without padding.

L tokens of the packed row, R rows of the same tokens apart: a row [prefix | branch] for every branch, trees in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

Range = tuple[int, int]  # from the first token to before the second


@dataclass(frozen=True)
class PrefixGroup:
    """A prefix and the branches after it, in tokens.

    Attributes:
        prefix: tokens that all branches share.
        branches: the tokens of each.
        bidirectional_prefix: the prefix's tokens see one another in both directions, as PaliGemma's do, and not only
            backwards.

    Raises:
        ValueError: a part has no token, or there is no branch.
    """

    prefix: int
    branches: tuple[int, ...]
    bidirectional_prefix: bool = False

    def __post_init__(self) -> None:
        if not self.branches or min(self.prefix, *self.branches) < 1:
            raise ValueError(
                "attention: a tree has a prefix and branches of at least one token each, got a prefix of "
                f"{self.prefix} and branches of {list(self.branches)}"
            )

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Block:
    """Tokens side by side that see the same ranges of keys.

    Attributes:
        queries: these tokens.
        keys: what they see, joined in this order.
        causal: the last query sees all keys, the one before it all but the last, and so on; otherwise all see all.
    """

    queries: Range
    keys: tuple[Range, ...]
    causal: bool

    @property
    def num_queries(self) -> int:
        """Tokens that see."""
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        """Tokens that are seen."""
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class PackedPrefixMask:
    """A row of trees: the one description of its attention, from which every executor takes what it needs.

    Raises:
        ValueError: there is no tree.
    """

    prefix_groups: tuple[PrefixGroup, ...]

    def __post_init__(self) -> None:
        if not self.prefix_groups:
            raise ValueError("attention: a row needs at least one tree, got none")

    @property
    def length(self) -> int:
        """L."""
        return sum(group.length for group in self.prefix_groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest of the R rows."""
        return max(group.prefix + max(group.branches) for group in self.prefix_groups)

    @cached_property
    def spans(self) -> tuple[tuple[Range, Range], ...]:
        """Where the prefix and the branch of each of the R rows are."""
        spans, start = [], 0
        for group in self.prefix_groups:
            prefix = (start, start + group.prefix)
            start += group.prefix
            for length in group.branches:
                spans.append((prefix, (start, start + length)))
                start += length
        return tuple(spans)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All tokens in order, as few blocks as there can be."""
        blocks, before = [], None
        both_ways = (group.bidirectional_prefix for group in self.prefix_groups for _ in group.branches)
        for (prefix, branch), free in zip(self.spans, both_ways, strict=True):
            first, before = prefix != before, prefix
            if not first:
                blocks.append(Block(branch, (prefix, branch), causal=True))
                continue
            whole = (prefix[0], branch[1])  # the first branch stands where it would stand alone
            if free:
                blocks.append(Block(prefix, (prefix,), causal=False))
            blocks.append(Block(branch if free else whole, (whole,), causal=True))
        return tuple(blocks)

    @cached_property
    def row_positions(self) -> tuple[Tensor, ...]:
        """Where in the packed row the tokens of each of the R rows are."""
        return tuple(torch.cat([torch.arange(*prefix), torch.arange(*branch)]) for prefix, branch in self.spans)

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """The packed [..., L] of what R rows [..., prefix + branch] hold: tokens, types, positions in any dimensions.

        A prefix is taken from the first of its rows; the others must hold the same there.

        Raises:
            ValueError: another number of rows, or rows of other lengths.
        """
        lengths = [len(places) for places in self.row_positions]
        if [row.shape[-1] for row in rows] != lengths:
            raise ValueError(
                f"attention: expected rows of {lengths} tokens, got {[row.shape[-1] for row in rows]}; a row is a "
                "prefix with one of its branches"
            )
        packed = rows[0].new_empty(*rows[0].shape[:-1], self.length)
        for row, places in zip(reversed(rows), reversed(self.row_positions), strict=True):
            packed[..., places.to(packed.device)] = row
        return packed

    def split(self, packed: Tensor, dim: int = -1) -> list[Tensor]:
        """The R rows of a packed tensor, whose tokens are along `dim`."""
        return [packed.index_select(dim, places.to(packed.device)) for places in self.row_positions]

    @cached_property
    def positions(self) -> Tensor:
        """`position_ids` [1, L] where positions have one dimension: every branch goes on from its prefix."""
        return self.join([torch.arange(len(places)) for places in self.row_positions])[None]

    @cached_property
    def target_positions(self) -> Tensor:
        """Where the branches' tokens are, [sum of branches], row by row."""
        return torch.cat([torch.arange(*branch) for _, branch in self.spans])

    @cached_property
    def predictor_positions(self) -> Tensor:
        """Where each token of `said` is predicted: at the branch's token before it, or at the prefix's last one."""
        return torch.cat(
            [
                places[prefix[1] - prefix[0] - 1 : -1]
                for (prefix, _), places in zip(self.spans, self.row_positions, strict=True)
            ]
        )

    @cached_property
    def visible(self) -> Tensor:
        """Which key (column) each token sees, a bool [L, L]: what everything else here must agree with."""
        seen = torch.zeros(self.length, self.length, dtype=torch.bool)
        for block in self.blocks:
            keys = torch.cat([torch.arange(*keys) for keys in block.keys])
            full = torch.ones(block.num_queries, block.num_keys, dtype=torch.bool)
            seen[torch.arange(*block.queries)[:, None], keys] = (
                full.tril(block.num_keys - block.num_queries) if block.causal else full
            )
        return seen

    def block_groups(self, device: torch.device) -> list[BlockGroup]:
        """The blocks that one call of a kernel can run together, with their tensors on a device."""
        if device not in self._block_groups:
            kinds = ([block for block in self.blocks if block.causal is causal] for causal in (False, True))
            self._block_groups[device] = [BlockGroup(blocks, self.length, device) for blocks in kinds if blocks]
        return self._block_groups[device]

    @cached_property
    def _block_groups(self) -> dict[torch.device, list[BlockGroup]]:
        return {}


class BlockGroup:
    """Blocks of one kind, causal or not: their queries and their keys laid side by side.

    Attributes:
        causal: which kind.
        num_queries: of each block.
        num_keys: of each block.
    """

    def __init__(self, blocks: Sequence[Block], length: int, device: torch.device) -> None:
        self.causal = blocks[0].causal
        self.num_queries = [block.num_queries for block in blocks]
        self.num_keys = [block.num_keys for block in blocks]
        self.queries = RangeGather([block.queries for block in blocks], length, device)
        self.keys = RangeGather([keys for block in blocks for keys in block.keys], length, device)
        self.device = device

    @cached_property
    def bias(self) -> BlockDiagonalMask:
        """The mask as xformers has it: a block for every block, causal from the bottom right."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = BlockDiagonalMask.from_seqlens(self.num_queries, self.num_keys, device=self.device)
        if not self.causal:
            return mask
        return mask.make_causal() if self.num_queries == self.num_keys else mask.make_causal_from_bottomright()


class RangeGather:
    """Takes ranges of a row's tokens, some of them several times; and takes gradients back without atomic additions.

    `index_select` adds the gradients of a token that was taken twice one on top of the other, in no certain order.
    Here every round of additions has distinct tokens.
    """

    def __init__(self, ranges: Sequence[Range], length: int, device: torch.device) -> None:
        index = torch.cat([torch.arange(*one) for one in ranges])
        self.length, self.device = length, device
        self.whole = index.equal(torch.arange(length))
        self.index = index.to(device)
        order = index.argsort(stable=True)
        taken = index[order]
        first = torch.searchsorted(taken, taken)  # where the copies of the same token begin
        copy = torch.arange(len(index)) - first
        self.rounds = [(taken[copy == n].to(device), order[copy == n].to(device)) for n in range(int(copy.max()) + 1)]

    def __call__(self, x: Tensor) -> Tensor:
        """The tokens taken of x [B, L, ...]; x itself where that is all of it in order."""
        return x if self.whole else _Take.apply(x, self)

    def put(self, taken: Tensor) -> Tensor:
        """What was taken back in its place in [B, L, ...]: copies added up, and 0 where nothing was taken."""
        return taken if self.whole else _Put.apply(taken, self)

    def take(self, x: Tensor) -> Tensor:
        """As a call, without gradients."""
        return x.index_select(1, self.index)

    def add_up(self, taken: Tensor) -> Tensor:
        """As `put`, without gradients."""
        (tokens, places), *more = self.rounds
        shape = (taken.shape[0], self.length, *taken.shape[2:])
        out = taken.new_empty(shape) if len(tokens) == self.length else taken.new_zeros(shape)
        out[:, tokens] = taken[:, places]
        for tokens, places in more:
            out[:, tokens] += taken[:, places]
        return out


class _Context(Protocol):
    """PyTorch's context of a function, with what the backward pass reads."""

    pick: RangeGather


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, pick: RangeGather) -> Tensor:
        ctx.pick = pick
        return pick.take(x)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.pick.add_up(grad), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, taken: Tensor, pick: RangeGather) -> Tensor:
        ctx.pick = pick
        return pick.add_up(taken)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.pick.take(grad), None
