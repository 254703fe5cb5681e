"""Filling of a cache by all processes: shards on disk, and one progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from mmalign.console import tracked
from mmalign.data.caches.array_cache import ArrayCache

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_ITEMS = 256
SHARD_BYTES = 2**26

Items = Mapping[str, Mapping[str, Tensor]]  # tensors by key and field


def fill(cache: ArrayCache, steps: Iterable[Items], total: int, description: str, accelerator: Accelerator) -> None:
    """Store the items of this process's steps, then wait for the other processes and index their items.

    A step may have no items. Its items go to one shard, so a stopped run resumes with a whole step.

    Args:
        cache: the cache to fill.
        steps: the items that each step has computed.
        total: number of steps, for the progress.
        description: text of the progress.
        accelerator: the accelerator, whose processes fill the cache together.

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


def num_bytes(items: Items) -> int:
    """Return the total size of items in bytes."""
    return sum(x.nbytes for item in items.values() for x in item.values())
