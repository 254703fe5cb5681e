"""Precomputed per-pair tensors (reference scores, inverted latents), cached on disk before training.

A method declares them with a PrecomputeSpec. One pass over the data fills them, in the data set's own order. A pair's
tensors depend on the pair and its draw, not on the batch size, the number of processes or the order of an epoch. Only
their rounding depends on the batch in which a network computes them; docs/performance.md has the size of the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.data.caches.array_cache import ArrayCache, Fingerprint
from mmalign.data.loaders.loader import Loader

Pairs = Loader[Any, Any, Any]  # a loader of pairs
Tensors = dict[str, Tensor]
RequiredKeys = dict[str, tuple[int, int]]  # key -> (draw, pair's number)


@dataclass(frozen=True)
class PrecomputeSpec:
    """Declaration of a method's tensors that are computed once per pair and draw.

    Attributes:
        num_draws: epochs after which a pair's draws repeat; 1 if there are none.
        settings: hyper-parameters that the tensors depend on.
        scores: the tensors replace the reference.
        compute: maps (policy, batch, config, rng) to a batch's tensors by name, each [B, ...]; None uses the reference
            scores of the method's one contrast.
    """

    num_draws: int
    settings: Mapping[str, str | int | float]
    scores: bool = False
    compute: Callable[..., Tensors] | None = None

    @property
    def folder(self) -> str:
        """Name of the cache's folder among a recipe's caches."""
        return "reference" if self.scores else "kept"


@dataclass(frozen=True)
class PrecomputeCache:
    """Cache of a method's precomputed tensors by pair and draw.

    Attributes:
        cache: the cache on disk.
        spec: the declaration of the tensors.
        required: a missing tensor is an error, because no loaded model can compute it.
    """

    cache: ArrayCache
    spec: PrecomputeSpec
    required: bool = False

    @classmethod
    def open(cls, folder: Path, spec: PrecomputeSpec, depends: Fingerprint) -> PrecomputeCache:
        """Open the cache in a recipe's folder of caches, by everything that the tensors depend on besides `spec`."""
        return cls(ArrayCache.open(folder / spec.folder, {**depends, **spec.settings}), spec)

    def key(self, pair: str, epoch: int) -> str:
        """Return the key of a pair's tensors in an epoch."""
        return f"{pair}/{epoch % self.spec.num_draws}"

    def lookup(self, pairs: Sequence[str], weights: Tensor, epoch: int, device: torch.device) -> Tensors | None:
        """Return the cached tensors of a batch by name, each [B, ...]; None if a pair with nonzero weight has none.

        The keys and weights [B] are those of the batch's pairs. Uncached pairs of weight 0 get zeros. Tensors of
        unequal length are zero-padded at the end.

        Raises:
            ValueError: a tensor is missing and `required` is set.
        """
        keys = [self.key(pair, epoch) for pair in pairs]
        is_cached = [key in self.cache for key in keys]
        # Nothing, if a row that counts is absent, or if no row shows the shapes of padding
        needs_more = any(weight and not cached for weight, cached in zip(weights, is_cached, strict=True))
        if needs_more or not len(self.cache):
            if self.required:
                raise ValueError(
                    f"data.cache: {self.cache.folder} lacks what the reference scores in a batch of epoch {epoch}, and "
                    "nothing else in memory can give it; run the same command again, and if that does not help, use "
                    "data.cache: off"
                )
            return None
        # Zeros for uncached padding, shaped like any cached row
        rows = [self.cache.get(key) if cached else None for key, cached in zip(keys, is_cached, strict=True)]
        like = next((row for row in rows if row is not None), None) or self.cache.get(next(iter(self.cache)))
        zeros = {name: torch.zeros_like(x) for name, x in like.items()}
        return {name: _stacked([(row or zeros)[name] for row in rows]).to(device) for name in like}

    def required_keys(self, loader: Pairs, num_batches: int) -> RequiredKeys:
        """Return the keys that the first `num_batches` batches of every process need, by draw and pair."""
        taken = loader.sampler.taken(num_batches, self.spec.num_draws)
        return {self.key(loader.key(number), draw): (draw, number) for draw, number in taken}

    def num_batches_read(self, loader: Pairs, required: RequiredKeys, num_batches: int) -> int:
        """Return the most batches that a training of `num_batches` batches reads, with all that can be computed cached.

        A batch of pairs that cannot be read makes no update, so the training reads a further batch.
        """
        num_unusable, sampler = len(self.cache.missing(required)), loader.sampler
        smallest = sampler.batch_size * sampler.world_size if sampler.shapes is None else 1  # the rest is padding
        return num_batches + num_unusable // smallest

    def missing(self, required: RequiredKeys, *, rank: int, world_size: int) -> dict[int, list[int]]:
        """Return the numbers of the pairs that lack tensors, by draw, in this process's share of the required keys."""
        numbers: dict[int, list[int]] = {}
        for key in self.cache.share(required, rank=rank, world_size=world_size):
            draw, number = required[key]
            numbers.setdefault(draw, []).append(number)
        return numbers

    def compute(
        self, loader: Pairs, missing: Mapping[int, Sequence[int]], compute: Callable[[Any, int], Tensors]
    ) -> Iterator[dict[str, Tensors]]:
        """Yield the tensors of each batch of the missing pairs, by key; pairs that cannot be read have none.

        `missing` has numbers of pairs by draw. `compute` maps (batch, draw) to tensors by name, each [B, ...].
        """
        for draw, numbers in missing.items():
            for batch in loader.read_pairs(draw, numbers):
                # A batch is computed whole, and only its readable pairs are stored
                good = [row for row, weight in enumerate(batch.weights) if weight]
                tensors = compute(batch, draw) if good else {}
                yield {
                    self.key(batch.keys[row], draw): {name: x[row].cpu().clone() for name, x in tensors.items()}
                    for row in good
                }


def _stacked(rows: Iterable[Tensor]) -> Tensor:
    """Return the tensors stacked to [B, ...], zero-padded at the end if their lengths differ."""
    tensors = list(rows)
    if len({x.shape for x in tensors}) == 1:
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
