"""Training and validation data of a recipe, as encoded batches for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.precompute import PrecomputeCache
from mmalign.data.loaders.loader import Loader, Reader
from mmalign.data.pairs import Pairs, SkippedRow

if TYPE_CHECKING:
    from accelerate import Accelerator

Splits = tuple[Pairs[Any], Pairs[Any] | None]  # training and validation pairs, or prompts
AnyLoader = Loader[Any, Any, Any]


@dataclass(frozen=True)
class DataModule:
    """Loaders, encoder and caches of a recipe's data, of either modality.

    Attributes:
        encode: maps a loader's batch to the encoded batch that a method takes.
        train_loader: the loader of the training data.
        validation_loader: the loader of the validation split; None if there is none.
        about: one-sentence summary of the data, for messages.
        precompute_cache: the cache of the method's precomputed tensors; None if it has none, or nothing is cached.
        features: the cache of image features; None if it is not used.
        latents: the cache of latents; None if it is not used.
        text: the cache of text embeddings; None if it is not used.
    """

    encode: Callable[[Any], Any]
    train_loader: AnyLoader
    validation_loader: AnyLoader | None
    about: str
    precompute_cache: PrecomputeCache | None = None
    features: ArrayCache | None = None
    latents: ArrayCache | None = None
    text: ArrayCache | None = None

    @property
    def caches(self) -> list[ArrayCache]:
        """All caches in use."""
        precomputed = self.precompute_cache.cache if self.precompute_cache is not None else None
        return [cache for cache in (self.latents, self.text, self.features, precomputed) if cache is not None]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the encoded training batches of an epoch, from number `start`."""
        return self._encoded(self.train_loader, epoch, start)

    def validation_batches(self) -> Iterator[Any]:
        """Yield the encoded validation batches, always in the same order; none without a validation split."""
        return self._encoded(self.validation_loader, 0, 0) if self.validation_loader else iter(())

    def _encoded(self, loader: AnyLoader, epoch: int, start: int) -> Iterator[Any]:
        for batch in loader.batches(epoch, start):
            encoded = self.encode(batch)
            if self.precompute_cache is not None:
                precomputed = self.precompute_cache.lookup(batch.keys, batch.weights, epoch, encoded.weights.device)
                encoded = replace(encoded, precomputed=precomputed)
            yield encoded

    def batch_locations(self, epoch: int, number: int) -> list[str]:
        """Return the locations of a training batch's pairs, for messages."""
        return self.train_loader.batch_locations(epoch, number)

    def skipped(self) -> list[SkippedRow]:
        """Return the rows skipped in the batches so far."""
        return self.train_loader.skipped + (self.validation_loader.skipped if self.validation_loader else [])


def open_loaders(
    reader: Reader[Any, Any, Any],
    splits: Splits,
    accelerator: Accelerator,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    max_bad: int | None = None,
    shapes_of: Callable[[Pairs[Any]], Sequence[Hashable] | None] = lambda _: None,
    liked_share: float | None = None,
) -> tuple[AnyLoader, AnyLoader | None]:
    """Return this process's loaders of the training and the validation split, checked for a readable pair.

    `shapes_of` returns the size of each pair's images, which a batch has in common, or None for one size. The other
    arguments are those of `Loader`; the share of liked rows is the training split's.

    Raises:
        ValueError: a split has no readable pair, or too many bad rows.
    """

    def open_loader(pairs: Pairs[Any], **options: Any) -> AnyLoader:
        common = {"num_workers": num_workers, "max_bad": max_bad, **options}
        loader = Loader(pairs, reader, batch_size=batch_size, seed=seed, shapes=shapes_of(pairs), **common)
        loader.check_readable()
        return loader

    train, validation = splits
    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = open_loader(train, liked_share=liked_share, **processes)
    # Every process scores the whole validation split, so that all have the same number
    return loader, open_loader(validation, keep_last=True) if validation is not None else None


def summarize(splits: Splits) -> str:
    """Return a summary of both splits, for messages."""
    train, validation = splits
    return train.summary() + (f" {len(validation):,} more are held out." if validation is not None else "")
