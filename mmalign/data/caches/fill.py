"""Fill the caches of latents and text embeddings."""

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

SHARD = 512  # items of a file of a cache


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
    """Encode every image that the cache lacks; yields 1 for each, or the image that could not be read."""
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
    """Encode every prompt that the cache lacks; yields how many were stored."""
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
    """A prepared image whose arrays are not cached yet: its key, pixels [3, R, R] in [-1, 1], and sizes [6]."""

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
    """Every image (with `flip`, also mirrored) whose arrays the cache lacks, each once; a bad one comes as Dropped.

    Store what is made of it under `key`, together with its sizes under "sizes". A bad image is not stored.

    Args:
        pairs: whose images.
        transform: how they become squares; `crop` must be "center".
        cache: what is asked for keys; it may grow meanwhile.
        num_workers: processes that decode; 0 decodes in this one.
        rank: this process among `world_size`, which share the images.
        world_size: how many processes share them.
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
    """Pair and side of every image that lacks a view, each image once, of this process's share of all images."""
    seen, uncached = set[str](), list[tuple[int, int]]()
    for number in range(len(pairs)):
        pair = pairs[number]
        for side, ref in enumerate((pair.chosen, pair.rejected)):
            if ref.key in seen:
                continue
            # Images are dealt out as `ArrayCache.share` deals out keys; who decodes one makes both of its views.
            mine = len(seen) % world_size == rank
            seen.add(ref.key)
            views = (image_key(ref, transform.resolution, mirror=m) for m in _mirrors(transform))
            if mine and cache.missing(views):
                uncached.append((number, side))
    return uncached


class _UncachedImages(Dataset[list[ImageToEncode | SkippedRow]]):
    """The views of an image (pair, side) that the cache lacks."""

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
