"""Reading of prompts, for methods that generate their own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmalign.data.formats.prompts import PromptRow


@dataclass(frozen=True)
class PromptBatch:
    """Batch of B prompts: their ids, their texts, and weights [B] float32, 0 for padding."""

    rows: list[int]
    prompts: list[str]
    weights: Tensor


class PromptReader:
    """Reader of prompts, all of which can be used."""

    def read(self, pair: PromptRow, epoch: int) -> PromptRow:
        """Return the prompt."""
        return pair

    def collate(self, pairs: Sequence[PromptRow], examples: Sequence[PromptRow], weights: Tensor) -> PromptBatch:
        """Return the batch of these prompts."""
        return PromptBatch([pair.row for pair in pairs], [pair.prompt for pair in pairs], weights)
