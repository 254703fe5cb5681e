"""Filling of a cache by all processes: shards on disk, and one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.console import tracked
from mmalign.data.caches.array_cache import ArrayCache

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_ITEMS = 256
SHARD_BYTES = 2**26

Items = Mapping[str, Mapping[str, Tensor]]  # tensors by key and field

T = TypeVar("T")
R = TypeVar("R")


def fill(cache: ArrayCache, steps: Iterable[Items], total: int, description: str, accelerator: Accelerator) -> None:
    """Store the items of this process's steps, `total` in number, then wait for the others and index their items.

    A step may have no items. Its items go to one shard, so a stopped run resumes with a whole step.

    Raises:
        CheckpointError: the disk is full or not writable; earlier shards stay.
    """
    shard: dict[str, Mapping[str, Tensor]] = {}
    for items in tracked(steps, description, total):
        # A shard's items have the same fields; an item of others begins the next shard
        if shard and items and _fields(items) != _fields(shard):
            cache.put(shard)
            shard = {}
        shard |= items
        if len(shard) >= SHARD_ITEMS or num_bytes(shard) >= SHARD_BYTES:
            cache.put(shard)
            shard = {}
    # The rest, which may be empty; `refresh` then indexes the shards of the other processes
    cache.put(shard)
    accelerator.wait_for_everyone()
    cache.refresh()


def _fields(items: Items) -> set[str]:
    return set(next(iter(items.values())))


def in_workers(read: Callable[[T], R], items: Sequence[T], num_workers: int) -> Iterator[R]:
    """Yield what `read` returns for each item, in order; other processes read ahead, or this one does for 0."""
    # A generator of its own: otherwise the loader would advance the global one
    generator = Generator().manual_seed(0)
    yield from DataLoader(_Read(read, items), batch_size=None, num_workers=num_workers, generator=generator)


class _Read(Dataset[R], Generic[T, R]):
    """Dataset of what a function returns for items."""

    def __init__(self, read: Callable[[T], R], items: Sequence[T]) -> None:
        self.read, self.items = read, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> R:
        return self.read(self.items[number])


def num_bytes(items: Items) -> int:
    """Return the total size of items in bytes."""
    return sum(x.nbytes for item in items.values() for x in item.values())
