"""Training and validation data of a recipe, as encoded batches for the training loop."""

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

Splits = tuple[Pairs[Any], Pairs[Any] | None]  # training and validation pairs, or prompts


Loader = ImagePairLoader | ResponsePairLoader | PromptLoader


@dataclass(frozen=True)
class DataModule:
    """Loaders, encoder and caches of a recipe's data, of either modality.

    Attributes:
        encode: maps a loader's batch to the encoded batch that a method takes.
        train_loader: the loader of the training data.
        validation_loader: the loader of the validation split; None if there is none.
        about: one-sentence summary of the data, for messages.
        precompute_cache: the cache of the method's precomputed tensors; None if it has none, or nothing is cached.
        features: the cache of image features; None if nothing is cached.
        caches: all caches in use, including the two above.
    """

    encode: Callable[[Any], Any]
    train_loader: Loader
    validation_loader: Loader | None
    about: str
    precompute_cache: PrecomputeCache | None = None
    features: ArrayCache | None = None
    caches: tuple[ArrayCache, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the encoded training batches of an epoch, from number `start`."""
        return self._encoded(self.train_loader, epoch, start)

    def validation_batches(self) -> Iterator[Any]:
        """Yield the encoded validation batches, always in the same order; none without a validation split."""
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
        """Return the locations of a training batch's pairs, for messages."""
        return self.train_loader.batch_locations(epoch, number)

    def skipped(self) -> list[SkippedRow]:
        """Return the rows skipped in the batches so far."""
        return self.train_loader.skipped + (self.validation_loader.skipped if self.validation_loader else [])


def open_loaders(
    make: Callable[..., Loader], train: Pairs[Any], validation: Pairs[Any] | None, accelerator: Any
) -> tuple[Loader, Loader | None]:
    """Return this process's loaders of the training and the validation split, checked for a readable pair.

    Raises:
        ValueError: a split has no readable pair, or too many bad rows.
    """
    loader = make(pairs=train, rank=accelerator.process_index, world_size=accelerator.num_processes)
    # Every process scores the whole validation split, so that all have the same number.
    held_out = make(pairs=validation, keep_last=True) if validation is not None else None
    for checked in (loader, held_out):
        if checked is not None:
            checked.check_readable()
    return loader, held_out
