"""Attention masks of packed rows, in which several responses share a prefix: [prefix | branch | branch ...].

A prefix group is one sample: an image with its prompt (the prefix), followed by any number of responses (the branches).
A branch's token sees the prefix and its own branch up to itself, as in an unpacked row. Branches do not see each other,
nor do groups. A row holds any number of groups one after the other, without padding.

L tokens of the packed row; R unpacked rows [prefix | branch], one for each branch, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

Range = tuple[int, int]  # start and stop, in tokens


@dataclass(frozen=True)
class PrefixGroup:
    """Lengths of a prefix and of the branches after it, in tokens.

    Attributes:
        prefix: the length of the prefix that all branches share.
        branches: the length of each branch.
        bidirectional_prefix: the prefix's tokens attend to each other in both directions, as in PaliGemma.

    Raises:
        ValueError: a part has no token, or there is no branch.
    """

    prefix: int
    branches: tuple[int, ...]
    bidirectional_prefix: bool = False

    def __post_init__(self) -> None:
        if not self.branches or min(self.prefix, *self.branches) < 1:
            raise ValueError(
                "attention: expected a prefix and branches of at least one token each, got a prefix of "
                f"{self.prefix} and branches of {list(self.branches)}"
            )

    @cached_property
    def length(self) -> int:
        """The number of tokens."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Block:
    """Consecutive queries that see the same ranges of keys.

    Attributes:
        queries: the range of the queries.
        keys: the ranges of their keys, joined in this order.
        causal: the last query sees all keys, the one before it all but the last, and so on. Otherwise every query sees
            all keys.
    """

    queries: Range
    keys: tuple[Range, ...]
    causal: bool

    @cached_property
    def num_queries(self) -> int:
        """The number of queries."""
        return self.queries[1] - self.queries[0]

    @cached_property
    def num_keys(self) -> int:
        """The number of keys."""
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class PackedPrefixMask:
    """The attention mask of a packed row of prefix groups, in the forms that the backends need.

    Raises:
        ValueError: there is no prefix group.
    """

    prefix_groups: tuple[PrefixGroup, ...]

    def __post_init__(self) -> None:
        if not self.prefix_groups:
            raise ValueError("attention: expected at least one prefix group, got none")

    @cached_property
    def length(self) -> int:
        """The number of tokens L."""
        return sum(group.length for group in self.prefix_groups)

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest unpacked row."""
        return max(group.prefix + max(group.branches) for group in self.prefix_groups)

    @cached_property
    def spans(self) -> tuple[tuple[Range, Range], ...]:
        """The ranges of the prefix and of the branch, for each of the R rows."""
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
        """The fewest blocks that cover all tokens, in order."""
        blocks, before = [], None
        both_ways = (group.bidirectional_prefix for group in self.prefix_groups for _ in group.branches)
        for (prefix, branch), free in zip(self.spans, both_ways, strict=True):
            first, before = prefix != before, prefix
            # A later branch is apart from its prefix, so its keys are two ranges
            if not first:
                blocks.append(Block(branch, (prefix, branch), causal=True))
                continue
            whole = (prefix[0], branch[1])  # the first branch follows its prefix directly, as in an unpacked row
            # A prefix with attention both ways is a block of its own
            if free:
                blocks.append(Block(prefix, (prefix,), causal=False))
            blocks.append(Block(branch if free else whole, (whole,), causal=True))
        return tuple(blocks)

    @cached_property
    def row_positions(self) -> tuple[Tensor, ...]:
        """The packed row's indices of the tokens of each of the R rows."""
        return tuple(torch.cat([torch.arange(*prefix), torch.arange(*branch)]) for prefix, branch in self.spans)

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Pack R rows [..., prefix + branch] of tokens, types or positions into [..., L].

        A prefix is copied from the first of its rows; the other rows must have the same prefix.

        Raises:
            ValueError: the number of rows or their lengths do not match.
        """
        lengths = [len(positions) for positions in self.row_positions]
        if [row.shape[-1] for row in rows] != lengths:
            raise ValueError(
                f"attention: expected rows of {lengths} tokens, got {[row.shape[-1] for row in rows]}; a row is a "
                "prefix with one of its branches"
            )
        packed = rows[0].new_empty(*rows[0].shape[:-1], self.length)
        # The first row of a prefix is written last, so its copy stays
        for row, positions in zip(reversed(rows), reversed(self.row_positions), strict=True):
            packed[..., positions.to(packed.device)] = row
        return packed

    def split(self, packed: Tensor, dim: int = -1) -> list[Tensor]:
        """Return the R unpacked rows of a packed tensor, whose tokens are along `dim`."""
        return [packed.index_select(dim, positions.to(packed.device)) for positions in self.row_positions]

    @cached_property
    def positions(self) -> Tensor:
        """One-dimensional `position_ids` [1, L]: every branch continues from its prefix."""
        return self.join([torch.arange(len(positions)) for positions in self.row_positions])[None]

    @cached_property
    def target_positions(self) -> Tensor:
        """The indices of the branches' tokens, [sum of branches], row by row."""
        return torch.cat([torch.arange(*branch) for _, branch in self.spans])

    @cached_property
    def predictor_positions(self) -> Tensor:
        """The index that predicts each target token: the branch's token before it, or the prefix's last token."""
        return torch.cat(
            [
                positions[prefix[1] - prefix[0] - 1 : -1]
                for (prefix, _), positions in zip(self.spans, self.row_positions, strict=True)
            ]
        )

    @cached_property
    def visible(self) -> Tensor:
        """The equivalent dense mask, bool [L, L]: true where the query (row) sees the key (column)."""
        visible = torch.zeros(self.length, self.length, dtype=torch.bool)
        for block in self.blocks:
            keys = torch.cat([torch.arange(*keys) for keys in block.keys])
            full = torch.ones(block.num_queries, block.num_keys, dtype=torch.bool)
            visible[torch.arange(*block.queries)[:, None], keys] = (
                full.tril(block.num_keys - block.num_queries) if block.causal else full
            )
        return visible

    def block_groups(self, device: torch.device) -> list[BlockGroup]:
        """Return the blocks grouped by kernel call, with their tensors on a device."""
        if device not in self._block_groups:
            kinds = ([block for block in self.blocks if block.causal is causal] for causal in (False, True))
            self._block_groups[device] = [BlockGroup(blocks, self.length, device) for blocks in kinds if blocks]
        return self._block_groups[device]

    @cached_property
    def _block_groups(self) -> dict[torch.device, list[BlockGroup]]:
        return {}


class BlockGroup:
    """Blocks that run in one kernel call: all causal or all full, with their queries and keys concatenated.

    Attributes:
        causal: the blocks are causal.
        num_queries: the number of queries of each block.
        num_keys: the number of keys of each block.
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
        """The block-diagonal mask for xformers; causal blocks align queries and keys at the bottom right."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = BlockDiagonalMask.from_seqlens(self.num_queries, self.num_keys, device=self.device)
        if not self.causal:
            return mask
        # With as many queries as keys both alignments are one
        return mask.make_causal() if self.num_queries == self.num_keys else mask.make_causal_from_bottomright()


class RangeGather:
    """Gather of token ranges, which may repeat tokens, with a deterministic backward pass.

    `index_select` adds the gradients of a repeated token atomically, in an undefined order. Here each round of
    additions has distinct tokens.
    """

    def __init__(self, ranges: Sequence[Range], length: int, device: torch.device) -> None:
        index = torch.cat([torch.arange(*bounds) for bounds in ranges])
        self.length, self.device = length, device
        self.is_identity = index.equal(torch.arange(length))
        self.index = index.to(device)
        # Round n scatters the n-th copy of every token
        order = index.argsort(stable=True)
        tokens = index[order]
        copy = torch.arange(len(index)) - torch.searchsorted(tokens, tokens)
        self.rounds = [(tokens[copy == n].to(device), order[copy == n].to(device)) for n in range(int(copy.max()) + 1)]

    def __call__(self, x: Tensor) -> Tensor:
        """Gather the ranges' tokens from x [B, L, ...]; return x itself if they are all tokens in order."""
        return x if self.is_identity else _Linear.apply(x, self._gather, self._scatter)

    def put(self, gathered: Tensor) -> Tensor:
        """Scatter gathered tokens back to [B, L, ...]: copies are added, and tokens that were not gathered are 0."""
        return gathered if self.is_identity else _Linear.apply(gathered, self._scatter, self._gather)

    def _gather(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def _scatter(self, gathered: Tensor) -> Tensor:
        # The first round writes, later ones add to tokens that occur again
        (tokens, places), *later_rounds = self.rounds
        shape = (gathered.shape[0], self.length, *gathered.shape[2:])
        out = gathered.new_empty(shape) if len(tokens) == self.length else gathered.new_zeros(shape)
        out[:, tokens] = gathered[:, places]
        for tokens, places in later_rounds:
            out[:, tokens] += gathered[:, places]
        return out


class _Linear(torch.autograd.Function):
    """Linear map of tensors, with the adjoint map as its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grads[0]), None, None
