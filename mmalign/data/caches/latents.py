"""Encoding of the images and prompts that the caches of latents and text lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.fill import Items
from mmalign.data.images import BadImage, decode, image_key, prepare
from mmalign.data.loaders.encoder import encode_images, encode_prompts, text_key
from mmalign.data.loaders.image_pairs import ImageTransform
from mmalign.data.pairs import ImagePair, Pairs, SkippedRow
from mmalign.families.base import TextToImage

Views = dict[str, tuple[Tensor, Tensor]]  # key -> pixels [3, R, R] in [-1, 1], sizes [6]
ImageNumber = tuple[int, int]  # number of the pair, side


def encode_latents(
    family: TextToImage, images: Iterable[Views | SkippedRow], on_bad: Callable[[SkippedRow], None]
) -> Iterator[Items]:
    """Yield the latent posteriors of each image's views; pass unreadable images to `on_bad`."""
    for views in images:
        if isinstance(views, SkippedRow):
            on_bad(views)
            yield {}
            continue
        moments = {key: encode_images(family, pixels[None]) for key, (pixels, _) in views.items()}
        yield {
            key: {"mean": moments[key].mean[0].cpu(), "std": moments[key].std[0].cpu(), "sizes": sizes}
            for key, (_, sizes) in views.items()
        }


def encode_texts(family: TextToImage, prompts: Sequence[str]) -> Iterator[Items]:
    """Yield the conditioning of each prompt."""
    for prompt in prompts:
        yield {text_key(prompt): {name: x[0].cpu() for name, x in encode_prompts(family, [prompt]).tensors.items()}}


def uncached_images(
    pairs: Pairs[ImagePair], transform: ImageTransform, cache: ArrayCache, *, rank: int = 0, world_size: int = 1
) -> list[ImageNumber]:
    """Return each image in this process's share that lacks a view in the cache, once.

    With `transform.flip` an image has two views, plain and mirrored. The process that decodes it makes both.
    """
    assert transform.crop == "center", "random crops are not cached"
    seen, uncached = set[str](), list[ImageNumber]()
    for number, pair in enumerate(pairs):
        for side, ref in enumerate((pair.chosen, pair.rejected)):
            if ref.key in seen:
                continue
            # Share images as `ArrayCache.share` shares keys
            mine = len(seen) % world_size == rank
            seen.add(ref.key)
            if mine and cache.missing(image_key(ref, transform.resolution, mirror=m) for m in _mirrors(transform)):
                uncached.append((number, side))
    return uncached


def read_images(
    pairs: Pairs[ImagePair],
    transform: ImageTransform,
    cache: ArrayCache,
    images: Sequence[ImageNumber],
    *,
    num_workers: int = 0,
) -> Iterator[Views | SkippedRow]:
    """Yield each image's views that the cache lacks, or a SkippedRow for an unreadable image."""
    loader: Iterable[Views | SkippedRow] = DataLoader(
        _Images(pairs, transform, cache),
        sampler=images,
        batch_size=None,
        num_workers=num_workers,
        generator=Generator().manual_seed(0),
    )
    yield from loader


def _mirrors(transform: ImageTransform) -> tuple[bool, ...]:
    return (False, True) if transform.flip else (False,)


class _Images(Dataset[Views | SkippedRow]):
    """Dataset that maps an image to its views that the cache lacks."""

    def __init__(self, pairs: Pairs[ImagePair], transform: ImageTransform, cache: ArrayCache) -> None:
        self.pairs, self.transform, self.cache = pairs, transform, cache

    def __getitem__(self, image: ImageNumber) -> Views | SkippedRow:
        number, side = image
        pair = self.pairs[number]
        ref, resolution = (pair.chosen, pair.rejected)[side], self.transform.resolution
        try:
            decoded = decode(ref)
        except BadImage as error:
            return error.skipped
        mirrors = {image_key(ref, resolution, mirror=mirror): mirror for mirror in _mirrors(self.transform)}
        return {key: prepare(decoded, resolution, mirror=mirrors[key]) for key in self.cache.missing(mirrors)}
