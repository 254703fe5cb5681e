"""One rule for tokens: a prompt is tokenised together with each of its responses, and the response is what follows.

A tokenizer may merge across the border of prompt and response, so that neither can be tokenised alone. A response
therefore begins where the tokens of the prompt alone, of prompt with chosen and of prompt with rejected first differ:
the same place for both, and a token that straddles the border belongs to the response. Everything before is the
prompt's, images included, and is never cut; a response that is too long loses its tail.

N rows of a batch, L the longest row's tokens, R the longest response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenizedResponse:
    """One prompt with one response.

    Attributes:
        ids: of both.
        start: where the response begins in them.
        images: the keys of the prompt's images, in their order.
    """

    ids: tuple[int, ...]
    start: int
    images: tuple[str, ...] = ()

    @property
    def response(self) -> tuple[int, ...]:
        """The response's tokens."""
        return self.ids[self.start :]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with alike."""
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def expand(ids: Sequence[int], placeholder: int, images: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with every image's own in the place of its placeholder.

    Raises:
        ValueError: there are more or fewer placeholders than images.
    """
    num_placeholders = sum(token == placeholder for token in ids)
    if num_placeholders != len(images):
        raise ValueError(f"{num_placeholders} image placeholders in the text for {len(images)} images")
    rest = iter(images)
    return [token for one in ids for token in (next(rest) if one == placeholder else (one,))]


def cut_tail(row: TokenizedResponse, max_length: int) -> TokenizedResponse:
    """The row with at most that many tokens: the response loses its tail.

    Raises:
        ValueError: the prompt leaves no room for a response.
    """
    if row.start >= max_length:
        raise ValueError(f"the prompt has {row.start:,} tokens, its images' included, of {max_length:,} in all")
    return TokenizedResponse(row.ids[:max_length], row.start, row.images)


@dataclass(frozen=True)
class Tokens:
    """A batch of rows, padded on the right.

    Attributes:
        ids: [N, L].
        starts: where each row's response begins, [N].
        lengths: of each row, response included, [N].
        images: the keys of each row's images.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    images: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_rows(cls, rows: Sequence[TokenizedResponse], pad: int) -> Tokens:
        """The rows in one batch; `pad` is any token."""
        longest = max(len(row.ids) for row in rows)
        return cls(
            torch.tensor([[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows]),
            torch.tensor([row.start for row in rows]),
            torch.tensor([len(row.ids) for row in rows]),
            tuple(row.images for row in rows),
        )

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """The rows of all parts, padded to the longest of them."""
        longest = max(part.ids.shape[1] for part in parts)
        # With the last token of each row, which is a response's or padding: never an image's.
        ids = [torch.cat([x.ids, x.ids[:, -1:].expand(-1, longest - x.ids.shape[1])], 1) for x in parts]
        starts, lengths = (torch.cat([getattr(x, name) for x in parts]) for name in ("starts", "lengths"))
        whole = cls(torch.cat(ids), starts, lengths, tuple(row for x in parts for row in x.images))
        return whole._knowing(tuple(row for x in parts for row in x.rows))

    def __getitem__(self, rows: slice) -> Tokens:
        tokens = Tokens(self.ids[rows], self.starts[rows], self.lengths[rows], self.images[rows])
        return tokens._knowing(self.rows[rows])

    def to(self, device: torch.device) -> Tokens:
        """The same on another device."""
        moved = Tokens(self.ids.to(device), self.starts.to(device), self.lengths.to(device), self.images)
        return moved._knowing(self.rows)

    def _knowing(self, rows: tuple[TokenizedResponse, ...]) -> Tokens:
        """With its rows, which are known before: to ask a GPU for them would wait for it."""
        self.__dict__["rows"] = rows
        return self

    @cached_property
    def rows(self) -> tuple[TokenizedResponse, ...]:
        """The rows one by one, without their padding."""
        parts = zip(self.ids.tolist(), self.starts.tolist(), self.lengths.tolist(), self.images, strict=True)
        return tuple(TokenizedResponse(tuple(ids[:length]), start, images) for ids, start, length, images in parts)

    @cached_property
    def by_prompt(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the rows, those together that have all in common before their responses, images included."""
        groups = dict[tuple[object, ...], list[int]]()
        for number, row in enumerate(self.rows):
            groups.setdefault((row.images, row.ids[: row.start]), []).append(number)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def mask(self) -> Tensor:
        """Which tokens are no padding, [N, L]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @cached_property
    def is_response(self) -> Tensor:
        """Which tokens are a response's, [N, L]."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.starts[:, None]) & self.mask

    @cached_property
    def num_tokens(self) -> Tensor:
        """The tokens of each response, [N]."""
        return self.lengths - self.starts

    @cached_property
    def response_mask(self) -> Tensor:
        """Which of a response's places are filled, [N, R]."""
        return (
            torch.arange(max(len(row.response) for row in self.rows), device=self.ids.device) < self.num_tokens[:, None]
        )

    @cached_property
    def responses(self) -> Tensor:
        """The responses' tokens [N, R], the row's first token where a response has ended."""
        positions = self.starts[:, None] + torch.arange(self.response_mask.shape[1], device=self.ids.device)
        return self.ids.gather(1, positions.where(self.response_mask, 0))
