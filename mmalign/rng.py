"""Random numbers from position: keyed by (seed, epoch, row, stream, index), and drawn on the CPU.

The composition of a batch, its order, the number of processes and of loader workers do not matter, and going on after a
stop needs no state. A row id is a hash of the row's content (63 bits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class KeyedRNG:
    """The draws of one epoch."""

    seed: int
    epoch: int = 0

    def normal(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Standard normal numbers [len(rows), *shape], float32."""
        return self._each(rows, stream, index, lambda g: torch.randn(shape, generator=g))

    def uniform(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Numbers in [0, 1), [len(rows), *shape], float32."""
        return self._each(rows, stream, index, lambda g: torch.rand(shape, generator=g))

    def integers(self, rows: Sequence[int], low: int, high: int, stream: str, index: int = 0) -> Tensor:
        """Integers in [low, high), [len(rows)], int64."""
        return self._each(rows, stream, index, lambda g: torch.randint(low, high, (), generator=g))

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], stream: str, index: int = 0) -> Tensor:
        """Standard Gumbel numbers [len(rows), *shape], float32: added to logits, their argmax is a sample."""

        def draw(g: Generator) -> Tensor:
            # An exponential draw is never 0 in float64, where -log(-log(uniform)) could be infinite.
            return -torch.empty(shape, dtype=torch.float64).exponential_(generator=g).log().float()

        return self._each(rows, stream, index, draw)

    def _each(self, rows: Sequence[int], stream: str, index: int, draw: Callable[[Generator], Tensor]) -> Tensor:
        generator = Generator()
        drawn = []
        for row in rows:
            # Torch's CPU generator keeps 32 bits of a seed: now and then two rows draw alike, which does no harm.
            key = f"{self.seed}/{self.epoch}/{row}/{stream}/{index}".encode()
            generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
            drawn.append(draw(generator))
        return torch.stack(drawn)
