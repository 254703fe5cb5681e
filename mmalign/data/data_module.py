"""The training data of a recipe, opened, encoded and in batches: what stands between files and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.precompute import PrecomputeCache
from mmalign.data.loaders.image_pairs import ImagePairLoader
from mmalign.data.loaders.prompts import PromptBatch, PromptLoader
from mmalign.data.loaders.response_pairs import ResponsePairLoader
from mmalign.data.pairs import Pairs, SkippedRow

Splits = tuple[Pairs[Any], Pairs[Any] | None]  # to train on, and held out; of prompts alone, too


Loader = ImagePairLoader | ResponsePairLoader | PromptLoader


@dataclass(frozen=True)
class DataModule:
    """Pairs of a recipe as a method takes them, of one modality or the other.

    Attributes:
        encode: makes what a method takes of a loader's batch.
        train_loader: the loader of the pairs to learn from.
        validation_loader: the loader of those held out; None if there are none.
        about: one sentence on what there is, for people.
        precompute_cache: where the method's own arrays are kept; None if it has none, or nothing is cached.
        features: where images' features are kept; None if nothing is cached.
        caches: all that is read from, the two above among them.
    """

    encode: Callable[[Any], Any]
    train_loader: Loader
    validation_loader: Loader | None
    about: str
    precompute_cache: PrecomputeCache | None = None
    features: ArrayCache | None = None
    caches: tuple[ArrayCache, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The training batches of an epoch, from number `start` on."""
        return self._encoded(self.train_loader, epoch, start)

    def validation_batches(self) -> Iterator[Any]:
        """The held-out batches, always in the same order; none if nothing is held out."""
        return self._encoded(self.validation_loader, 0, 0) if self.validation_loader else iter(())

    def _encoded(self, loader: Loader, epoch: int, start: int) -> Iterator[Any]:
        for batch in loader.batches(epoch, start):
            encoded = self.encode(batch)
            if self.precompute_cache is not None and not isinstance(batch, PromptBatch):
                encoded = replace(
                    encoded, precomputed=self.precompute_cache.lookup(batch, epoch, encoded.weights.device)
                )
            yield encoded

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Where the pairs of a training batch lie, for people."""
        return self.train_loader.batch_locations(epoch, number)

    def skipped(self) -> list[SkippedRow]:
        """What could not be used in the batches so far."""
        return self.train_loader.skipped + (self.validation_loader.skipped if self.validation_loader else [])
