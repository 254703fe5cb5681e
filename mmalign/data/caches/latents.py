"""Encoding of the images and prompts that the caches of latents and text lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.fill import Items, in_workers
from mmalign.data.images import BadImage, ImageTransform, decode, image_key, prepare
from mmalign.data.loaders.encoder import encode_images, encode_prompts, text_key
from mmalign.data.pairs import ImagePair, ImageRef, Pairs, SkippedRow
from mmalign.data.shapes import Shapes
from mmalign.families.base import TextToImage

Views = dict[str, tuple[Tensor, Tensor]]  # key -> pixels [3, H, W] in [-1, 1], sizes [6]
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


class Edit(NamedTuple):
    """A prompt, empty for none, with a view of the source image that the text encoder sees."""

    prompt: str
    source: ImageRef
    size: ImageSize
    mirror: bool
    pad: bool

    def pixels(self) -> Tensor:
        """Return the source [1, 3, H, W]; white if it cannot be read, which a loader says of its pair."""
        try:
            image = decode(self.source)
        except BadImage:
            image = Image.new("RGB", self.size, "white")
        return prepare(image, self.size, mirror=self.mirror, pad=self.pad)[0][None]


def encode_texts(family: TextToImage, texts: Mapping[str, str | Edit]) -> Iterator[Items]:
    """Yield the conditioning of each prompt or edit, by its key."""
    for key, text in texts.items():
        prompt, source = (text, None) if isinstance(text, str) else (text.prompt, text.pixels())
        yield {key: {name: x[0].cpu() for name, x in encode_prompts(family, [prompt], source).tensors.items()}}


@dataclass(frozen=True)
class ImageViews:
    """Views of pairs' images that training reads: each image in its pair's size, plain and with `flip` also mirrored.

    Attributes:
        pairs: the pairs.
        shapes: the size of every pair's images.
        transform: the cut to that size; random crops are not cached.
    """

    pairs: Pairs[ImagePair]
    shapes: Shapes
    transform: ImageTransform

    def keys(self, pair: ImagePair, ref: ImageRef) -> dict[str, bool]:
        """Return the cache keys of a pair's image, and whether each is of the mirrored view."""
        size = self.shapes.of(pair)
        return {
            image_key(ref, size, mirror=mirror): mirror
            for mirror in ((False, True) if self.transform.flip else (False,))
        }

    def edits(self) -> Iterator[tuple[str, Edit]]:
        """Yield each pair's prompts, and the empty one, with every view of its source, by their keys."""
        for pair in self.pairs:
            assert pair.source is not None
            size = self.shapes.of(pair)
            for view, mirror in self.keys(pair, pair.source).items():
                for prompt in dict.fromkeys((pair.prompt, pair.rejected_prompt, "")):
                    edit = Edit(prompt, pair.source, size, mirror, self.transform.pad)
                    yield text_key(prompt, view), edit

    def uncached(self, cache: ArrayCache, *, rank: int = 0, world_size: int = 1) -> list[ImageNumber]:
        """Return each image in this process's share that lacks a view in the cache, once.

        The process that decodes an image makes both of its views.
        """
        assert self.transform.crop == "center", "random crops are not cached"
        seen, uncached = set[str](), list[ImageNumber]()
        for number, pair in enumerate(self.pairs):
            for side, ref in enumerate(pair.images):
                keys = self.keys(pair, ref)
                if next(iter(keys)) in seen:
                    continue
                # Share images as `ArrayCache.share` shares keys
                is_own = len(seen) % world_size == rank
                seen.add(next(iter(keys)))
                if is_own and cache.missing(keys):
                    uncached.append((number, side))
        return uncached

    def read(
        self, cache: ArrayCache, images: Sequence[ImageNumber], *, num_workers: int = 0
    ) -> Iterator[Views | SkippedRow]:
        """Return for each image its views that the cache lacks, or a SkippedRow for an unreadable image."""
        return in_workers(partial(self._read, cache), images, num_workers)

    def _read(self, cache: ArrayCache, image: ImageNumber) -> Views | SkippedRow:
        pair = self.pairs[image[0]]
        ref = pair.images[image[1]]
        try:
            decoded = decode(ref)
        except BadImage as error:
            return error.skipped
        size, mirrors, pad = self.shapes.of(pair), self.keys(pair, ref), self.transform.pad
        return {key: prepare(decoded, size, mirror=mirrors[key], pad=pad) for key in cache.missing(mirrors)}
