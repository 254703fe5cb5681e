"""Precomputation of the caches of latents and text embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, decode, prepare
from mmalign.data.loaders.encoder import encode_images, encode_prompts, text_key
from mmalign.data.loaders.image_pairs import ImageTransform, _skipped_row, image_key
from mmalign.data.pairs import Pairs, SkippedRow
from mmalign.families.base import TextToImage

SHARD = 512  # items per cache file


def fill_latents(
    family: TextToImage,
    pairs: Pairs,
    transform: ImageTransform,
    cache: ArrayCache,
    *,
    num_workers: int,
    rank: int,
    world_size: int,
) -> Iterator[int | SkippedRow]:
    """Encode every image that the cache lacks; yield 1 for each, or a SkippedRow for an unreadable one."""
    stored: dict[str, dict[str, Tensor]] = {}
    images = images_to_encode(pairs, transform, cache, num_workers=num_workers, rank=rank, world_size=world_size)
    for image in images:
        if isinstance(image, SkippedRow):
            yield image
            continue
        moments = encode_images(family, image.pixels[None])
        stored[image.key] = {"mean": moments.mean[0].cpu(), "std": moments.std[0].cpu(), "sizes": image.sizes}
        if len(stored) == SHARD:
            cache.put(stored)
            stored = {}
        yield 1
    cache.put(stored)


def fill_text(
    family: TextToImage, prompts: Sequence[str], cache: ArrayCache, *, rank: int, world_size: int
) -> Iterator[int]:
    """Encode every prompt that the cache lacks; yield the number of prompts in each shard stored."""
    prompts_by_key = {text_key(prompt): prompt for prompt in prompts}
    missing = cache.share(prompts_by_key, rank=rank, world_size=world_size)
    for start in range(0, len(missing), SHARD):
        keys = missing[start : start + SHARD]
        encoded = (encode_prompts(family, [prompts_by_key[key]]).tensors for key in keys)
        cache.put(
            {key: {name: x[0].cpu() for name, x in cond.items()} for key, cond in zip(keys, encoded, strict=True)}
        )
        yield len(keys)


@dataclass(frozen=True)
class ImageToEncode:
    """Prepared image that is not cached yet: its key, pixels [3, R, R] in [-1, 1], and sizes [6]."""

    key: str
    pixels: Tensor
    sizes: Tensor


def images_to_encode(
    pairs: Pairs,
    transform: ImageTransform,
    cache: ArrayCache,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[ImageToEncode | SkippedRow]:
    """Yield every image that the cache lacks, each once; an unreadable image comes as a SkippedRow.

    With `transform.flip` each image also comes mirrored. The caller stores the encoded image under `key`, with its
    sizes under "sizes". Bad images are not stored.

    Args:
        pairs: the pairs with the images.
        transform: the crop to a square; its `crop` must be "center".
        cache: the cache to fill; it may grow during the iteration.
        num_workers: number of processes that decode; 0 decodes in this one.
        rank: index of this process.
        world_size: number of processes that share the images.
    """
    assert transform.crop == "center", "random crops are not cached"
    uncached = _uncached_images(pairs, transform, cache, rank, world_size)
    loader = DataLoader(
        _UncachedImages(pairs, transform, cache),
        sampler=uncached,
        batch_size=None,
        num_workers=num_workers,
        generator=Generator().manual_seed(0),
    )
    for images in loader:
        yield from images


def _mirrors(transform: ImageTransform) -> tuple[bool, ...]:
    return (False, True) if transform.flip else (False,)


def _uncached_images(
    pairs: Pairs, transform: ImageTransform, cache: ArrayCache, rank: int, world_size: int
) -> list[tuple[int, int]]:
    """Return (pair, side) of each image in this process's share that lacks a view in the cache, each once."""
    seen, uncached = set[str](), list[tuple[int, int]]()
    for number in range(len(pairs)):
        pair = pairs[number]
        for side, ref in enumerate((pair.chosen, pair.rejected)):
            if ref.key in seen:
                continue
            # Share images as `ArrayCache.share` shares keys. The process that decodes an image makes both its views.
            mine = len(seen) % world_size == rank
            seen.add(ref.key)
            views = (image_key(ref, transform.resolution, mirror=m) for m in _mirrors(transform))
            if mine and cache.missing(views):
                uncached.append((number, side))
    return uncached


class _UncachedImages(Dataset[list[ImageToEncode | SkippedRow]]):
    """Dataset that maps an image (pair, side) to its views that the cache lacks."""

    def __init__(self, pairs: Pairs, transform: ImageTransform, cache: ArrayCache) -> None:
        self.pairs, self.transform, self.cache = pairs, transform, cache

    def __getitem__(self, pair_and_side: tuple[int, int]) -> list[ImageToEncode | SkippedRow]:
        pair = self.pairs[pair_and_side[0]]
        ref = (pair.chosen, pair.rejected)[pair_and_side[1]]
        try:
            image = decode(ref)
        except BadImage as error:
            return [_skipped_row(ref, error)]
        results: list[ImageToEncode | SkippedRow] = []
        for mirror in _mirrors(self.transform):
            key = image_key(ref, self.transform.resolution, mirror=mirror)
            if key not in self.cache:
                results.append(ImageToEncode(key, *prepare(image, self.transform.resolution, mirror=mirror)))
        return results
