"""Random numbers keyed by (seed, epoch, row, stream, index) and drawn on the CPU.

They do not depend on a batch's composition or order, or on the numbers of processes and loader workers. Resuming needs
no saved state. A row id is a hash of the row's content (63 bits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class KeyedRNG:
    """Random draws of one epoch."""

    seed: int
    epoch: int = 0

    def normal(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Return standard normal numbers [len(rows), *shape], float32."""
        return self._each(rows, stream, index, lambda g: torch.randn(shape, generator=g))

    def uniform(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Return uniform numbers in [0, 1), [len(rows), *shape], float32."""
        return self._each(rows, stream, index, lambda g: torch.rand(shape, generator=g))

    def integers(self, rows: Sequence[int], low: int, high: int, stream: str, index: int = 0) -> Tensor:
        """Return uniform integers in [low, high), [len(rows)], int64."""
        return self._each(rows, stream, index, lambda g: torch.randint(low, high, (), generator=g))

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Return standard Gumbel numbers [len(rows), *shape], float32; the argmax of logits plus these is a sample."""

        def draw(g: Generator) -> Tensor:
            # An exponential draw is never 0 in float64; -log(-log(uniform)) could be infinite.
            return -torch.empty(shape, dtype=torch.float64).exponential_(generator=g).log().float()

        return self._each(rows, stream, index, draw)

    def seed_globally(self, rows: Sequence[int], stream: str, index: int = 0) -> None:
        """Seed torch's generators of all devices for draws that a library makes itself, such as dropout.

        These draws depend on the batch's rows together. On resuming they are the same.
        """
        key = f"{self.seed}/{self.epoch}/{','.join(map(str, rows))}/{stream}/{index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))

    def _each(self, rows: Sequence[int], stream: str, index: int, draw: Callable[[Generator], Tensor]) -> Tensor:
        generator = Generator()
        drawn = []
        for row in rows:
            # Torch's CPU generator uses 32 bits of a seed; the rare equal draws of two rows are harmless.
            key = f"{self.seed}/{self.epoch}/{row}/{stream}/{index}".encode()
            generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
            drawn.append(draw(generator))
        return torch.stack(drawn)
