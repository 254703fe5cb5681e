"""Features of images on disk: what a frozen vision tower makes of an image is made once, by content, for all runs.

One image at a time, as in a batch, so that nothing changes by a bit: kept features are those that would be made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches import fingerprint
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImageRef
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.types import ImageView
from mmalign.families.vlm.image_features import backend_name

IDS = "ids"  # the field with the tokens that stand for the image
SHARD = 2**26  # bytes of a file, about
SHARE = 0.5  # of the free disk that features may take


def feature_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """What features, and the tokens that stand for them, depend on besides the image: all that makes them, and how."""
    parts, reader = list(family.encoders()), _processor(family)
    return {
        **{name: fingerprint.fingerprint_network(net) for name, net in parts},
        "config": fingerprint.fingerprint_config(family.network),
        "processor": fingerprint.fingerprint_files(reader, template=False),
        "run": "; ".join(sorted({backend_name(net) for _, net in parts})),
        "autocast": str(family.half),
    }


def tokenizer_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """What the tokens of words depend on."""
    return {"words": fingerprint.fingerprint_files(_processor(family))}


def _processor(family: Any) -> Any:
    """Of transformers; readers have it beside what methods ask of them."""
    return family.processor.processor


def cached_view(cache: ArrayCache | None, key: str) -> ImageView | None:
    """An image as a model takes it, with its features; None if they are not kept."""
    if cache is None or key not in cache:
        return None
    arrays = cache.get(key)
    return ImageView(tuple(arrays.pop(IDS).tolist()), {}, arrays)


def fill(
    family: VisionLanguage,
    images: Iterable[ImageRef],
    cache: ArrayCache,
    *,
    num_workers: int,
    rank: int,
    world_size: int,
) -> Iterator[int]:
    """Make and store the features of the images that the cache lacks, this process's share of them.

    Yields how many images that are, then 1 for each; after the first 0, if they would take more than half of the free
    disk, and nothing is stored then. An image that cannot be read is left out: a loader tells of it.
    """
    images_by_key = {ref.key: ref for ref in images}
    mine = [images_by_key[key] for key in cache.share(images_by_key, rank=rank, world_size=world_size)]
    yield len(mine)
    stored: dict[str, dict[str, Tensor]] = {}
    loader = DataLoader(
        _Views(mine, family.processor),
        batch_size=None,
        num_workers=num_workers,
        generator=Generator().manual_seed(0),
    )
    room: float | None = SHARE * shutil.disk_usage(cache.folder).free  # until the first image has told its size
    for key, view in loader:
        if view is not None:
            (arrays,) = family.features_as_tensors(family.encode_images({key: view})).values()
            arrays = {IDS: torch.tensor(view.ids), **arrays}
            if room is not None and _size([arrays]) * len(mine) * world_size > room:
                yield 0
                return
            room = None
            if stored and (_size(stored.values()) >= SHARD or next(iter(stored.values())).keys() != arrays.keys()):
                cache.put(stored)
                stored = {}
            stored[key] = {name: x.cpu() for name, x in arrays.items()}
        yield 1
    cache.put(stored)


class _Views(Dataset[tuple[str, ImageView | None]]):
    """Images by number, with their keys, as a model takes them; None for a bad one."""

    def __init__(self, images: list[ImageRef], processor: PromptProcessor) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[str, ImageView | None]:
        ref = self.images[number]
        try:
            return ref.key, self.processor.preprocess_image(decode(ref))
        except BadImage:
            return ref.key, None


def _size(items: Iterable[dict[str, Tensor]]) -> int:
    """In bytes."""
    return sum(x.nbytes for arrays in items for x in arrays.values())
