"""Tokens of prompts with responses, by one rule: each response is tokenized together with its prompt.

A tokenizer may merge across the border of prompt and response, so neither can be tokenized alone. A response therefore
begins where the tokens of the prompt alone, of prompt with chosen and of prompt with rejected first differ. The place
is the same for both responses, and a token that straddles the border belongs to the response. The prompt, images
included, is never cut; a response that is too long loses its tail.

N is the number of rows of a batch, L the longest row's tokens, R the longest response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class TokenizedResponse:
    """Tokens of a prompt with a response, the index of the response's first, and the keys of the prompt's images."""

    ids: tuple[int, ...]
    start: int
    images: tuple[str, ...] = ()

    @property
    def response(self) -> tuple[int, ...]:
        """The response's tokens."""
        return self.ids[self.start :]


def forget_padding(part: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Remove the padding and truncation of the last call from a tokenizer, or from that of a processor.

    Its files then do not depend on calls. Every call of a tokenizer of transformers sets both again.
    """
    from transformers import ProcessorMixin

    tokenizer = part.tokenizer if isinstance(part, ProcessorMixin) else part
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest prefix that all rows share."""
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def expand(ids: Sequence[int], placeholder: int, images: Sequence[Sequence[int]]) -> list[int]:
    """Replace each image placeholder by that image's tokens.

    Raises:
        ValueError: the number of placeholders differs from the number of images.
    """
    num_placeholders = sum(token == placeholder for token in ids)
    if num_placeholders != len(images):
        raise ValueError(f"{num_placeholders} image placeholders in the text for {len(images)} images")
    rest = iter(images)
    return [token for token_id in ids for token in (next(rest) if token_id == placeholder else (token_id,))]


def cut_tail(row: TokenizedResponse, max_length: int) -> TokenizedResponse:
    """Cut the row to at most `max_length` tokens: the response loses its tail.

    Raises:
        ValueError: the prompt leaves no room for a response.
    """
    if row.start >= max_length:
        raise ValueError(f"the prompt with its images has {row.start:,} tokens; the limit is {max_length:,}")
    return TokenizedResponse(row.ids[:max_length], row.start, row.images)


@dataclass(frozen=True)
class Tokens:
    """A batch of rows, padded on the right.

    Attributes:
        ids: [N, L].
        starts: the index of each response's first token, [N].
        lengths: each row's length, response included, [N].
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
        """Collate the rows into one batch; `pad` is any token."""
        longest = max(len(row.ids) for row in rows)
        return cls(
            torch.tensor([[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows]),
            torch.tensor([row.start for row in rows]),
            torch.tensor([len(row.ids) for row in rows]),
            tuple(row.images for row in rows),
        )

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Concatenate the rows of all parts, padded to the longest."""
        longest = max(part.ids.shape[1] for part in parts)
        # Pad with each row's last token. It is a response's or padding, never an image's.
        ids = [torch.cat([x.ids, x.ids[:, -1:].expand(-1, longest - x.ids.shape[1])], 1) for x in parts]
        starts, lengths = (torch.cat([getattr(x, name) for x in parts]) for name in ("starts", "lengths"))
        whole = cls(torch.cat(ids), starts, lengths, tuple(row for x in parts for row in x.images))
        return whole._knowing(tuple(row for x in parts for row in x.rows))

    def __getitem__(self, rows: slice) -> Tokens:
        tokens = Tokens(self.ids[rows], self.starts[rows], self.lengths[rows], self.images[rows])
        return tokens._knowing(self.rows[rows])

    def to(self, device: torch.device) -> Tokens:
        """Return a copy on another device."""
        moved = Tokens(self.ids.to(device), self.starts.to(device), self.lengths.to(device), self.images)
        return moved._knowing(self.rows)

    def _knowing(self, rows: tuple[TokenizedResponse, ...]) -> Tokens:
        """Set `rows` from known values, since reading them back from a GPU would wait for it."""
        self.__dict__["rows"] = rows
        return self

    @cached_property
    def rows(self) -> tuple[TokenizedResponse, ...]:
        """The rows one by one, without their padding."""
        parts = zip(self.ids.tolist(), self.starts.tolist(), self.lengths.tolist(), self.images, strict=True)
        return tuple(TokenizedResponse(tuple(ids[:length]), start, images) for ids, start, length, images in parts)

    @cached_property
    def by_prompt(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the rows, grouped by equal prompt tokens and images."""
        groups = dict[tuple[object, ...], list[int]]()
        for number, row in enumerate(self.rows):
            groups.setdefault((row.images, row.ids[: row.start]), []).append(number)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def mask(self) -> Tensor:
        """Mask of the tokens that are not padding, [N, L]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @cached_property
    def is_response(self) -> Tensor:
        """Mask of the response tokens, [N, L]."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.starts[:, None]) & self.mask

    @cached_property
    def num_tokens(self) -> Tensor:
        """The number of tokens of each response, [N]."""
        return self.lengths - self.starts

    @cached_property
    def response_mask(self) -> Tensor:
        """Mask of the filled positions of each response, [N, R]."""
        return (
            torch.arange(max(len(row.response) for row in self.rows), device=self.ids.device) < self.num_tokens[:, None]
        )

    @cached_property
    def responses(self) -> Tensor:
        """The responses' tokens [N, R]; the row's first token fills the positions after a response's end."""
        positions = self.starts[:, None] + torch.arange(self.response_mask.shape[1], device=self.ids.device)
        return self.ids.gather(1, positions.where(self.response_mask, 0))
