"""Fill the caches of latents and text embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.images import BadImage, decode, prepare
from mmalign.data.loaders.encoder import encode_images, encode_prompts, text_key
from mmalign.data.loaders.image_pairs import View, _dropped, image_key
from mmalign.data.pairs import Dropped, Pairs
from mmalign.families.base import TextToImage

SHARD = 512  # items of a file of a cache


def fill_latents(
    family: TextToImage, pairs: Pairs, view: View, cache: ArrayCache, *, num_workers: int, rank: int, world_size: int
) -> Iterator[int | Dropped]:
    """Encode every image that the cache lacks; yields 1 for each, or the image that could not be read."""
    stored: dict[str, dict[str, Tensor]] = {}
    found = images_to_encode(pairs, view, cache, num_workers=num_workers, rank=rank, world_size=world_size)
    for image in found:
        if isinstance(image, Dropped):
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
    there = {text_key(prompt): prompt for prompt in prompts}
    missing = cache.share(there, rank=rank, world_size=world_size)
    for start in range(0, len(missing), SHARD):
        keys = missing[start : start + SHARD]
        encoded = (encode_prompts(family, [there[key]]).tensors for key in keys)
        cache.put(
            {key: {name: x[0].cpu() for name, x in cond.items()} for key, cond in zip(keys, encoded, strict=True)}
        )
        yield len(keys)


@dataclass(frozen=True)
class ToEncode:
    """A prepared image whose arrays are not cached yet: its key, pixels [3, R, R] in [-1, 1], and sizes [6]."""

    key: str
    pixels: Tensor
    sizes: Tensor


def images_to_encode(
    pairs: Pairs, view: View, cache: ArrayCache, *, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[ToEncode | Dropped]:
    """Every image (with `flip`, also mirrored) whose arrays the cache lacks, each once; a bad one comes as Dropped.

    Store what is made of it under `key`, together with its sizes under "sizes". A bad image is not stored.

    Args:
        pairs: whose images.
        view: how they become squares; `crop` must be "center".
        cache: what is asked for keys; it may grow meanwhile.
        num_workers: processes that decode; 0 decodes in this one.
        rank: this process among `world_size`, which share the images.
        world_size: how many processes share them.
    """
    assert view.crop == "center", "random crops are not cached"
    wanted = _unstored(pairs, view, cache, rank, world_size)
    loader = DataLoader(
        _Undecoded(pairs, view, cache),
        sampler=wanted,
        batch_size=None,
        num_workers=num_workers,
        generator=Generator().manual_seed(0),
    )
    for found in loader:
        yield from found


def _mirrors(view: View) -> tuple[bool, ...]:
    return (False, True) if view.flip else (False,)


def _unstored(pairs: Pairs, view: View, cache: ArrayCache, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Pair and side of every image that lacks a view, each image once, of this process's share of all images."""
    seen, wanted = set[str](), list[tuple[int, int]]()
    for number in range(len(pairs)):
        pair = pairs[number]
        for side, ref in enumerate((pair.chosen, pair.rejected)):
            if ref.key in seen:
                continue
            # Images are dealt out as `ArrayCache.share` deals out keys; who decodes one makes both of its views.
            mine = len(seen) % world_size == rank
            seen.add(ref.key)
            views = (image_key(ref, view.resolution, mirror=m) for m in _mirrors(view))
            if mine and cache.missing(views):
                wanted.append((number, side))
    return wanted


class _Undecoded(Dataset[list[ToEncode | Dropped]]):
    """The views of an image (pair, side) that the cache lacks."""

    def __init__(self, pairs: Pairs, view: View, cache: ArrayCache) -> None:
        self.pairs, self.view, self.cache = pairs, view, cache

    def __getitem__(self, at: tuple[int, int]) -> list[ToEncode | Dropped]:
        pair = self.pairs[at[0]]
        ref = (pair.chosen, pair.rejected)[at[1]]
        try:
            image = decode(ref)
        except BadImage as error:
            return [_dropped(ref, error)]
        found: list[ToEncode | Dropped] = []
        for mirror in _mirrors(self.view):
            key = image_key(ref, self.view.resolution, mirror=mirror)
            if key not in self.cache:
                found.append(ToEncode(key, *prepare(image, self.view.resolution, mirror=mirror)))
        return found
