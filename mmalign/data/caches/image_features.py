"""Cache of image features from frozen vision towers, keyed by image content and shared by all runs.

Images are encoded one at a time, as in a training batch. Cached features therefore equal computed ones bit for bit.
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

IDS = "ids"  # field with the image's placeholder tokens
SHARD = 2**26  # approximate bytes per file
SHARE = 0.5  # share of the free disk that features may take


def feature_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """Return everything that image features and placeholder tokens depend on besides the image."""
    parts, reader = list(family.encoders()), _processor(family)
    return {
        **{name: fingerprint.fingerprint_network(net) for name, net in parts},
        "config": fingerprint.fingerprint_config(family.network),
        "processor": fingerprint.fingerprint_files(reader, template=False),
        "run": "; ".join(sorted({backend_name(net) for _, net in parts})),
        "autocast": str(family.half),
    }


def tokenizer_dependencies(family: VisionLanguage) -> dict[str, str | int | float]:
    """Return everything that text tokens depend on."""
    return {"words": fingerprint.fingerprint_files(_processor(family))}


def _processor(family: Any) -> Any:
    """Return the transformers processor inside a family's prompt processor."""
    return family.processor.processor


def cached_view(cache: ArrayCache | None, key: str) -> ImageView | None:
    """Return an image's view with its cached features; None if they are not in the cache."""
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
    """Encode and store this process's share of the images that the cache lacks.

    Yield the number of images, then 1 for each. If the features would take more than half of the free disk, yield 0
    after the first image and store nothing. Unreadable images are left out; the loaders report them.
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
    room: float | None = SHARE * shutil.disk_usage(cache.folder).free  # bytes; None once the first image fits
    for key, view in loader:
        if view is not None:
            # Encode one image
            (arrays,) = family.features_as_tensors(family.encode_images({key: view})).values()
            arrays = {IDS: torch.tensor(view.ids), **arrays}
            # Extrapolate the first image's size to all images of all processes
            if room is not None and _size([arrays]) * len(mine) * world_size > room:
                yield 0
                return
            room = None
            # Start a new shard when this one is full or the fields change
            if stored and (_size(stored.values()) >= SHARD or next(iter(stored.values())).keys() != arrays.keys()):
                cache.put(stored)
                stored = {}
            stored[key] = {name: x.cpu() for name, x in arrays.items()}
        yield 1
    cache.put(stored)


class _Views(Dataset[tuple[str, ImageView | None]]):
    """Dataset of (key, view) of images; the view of an unreadable image is None."""

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
    """Return the total size in bytes."""
    return sum(x.nbytes for arrays in items for x in arrays.values())
