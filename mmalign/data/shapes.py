"""Shapes of training images: aspect buckets, and the area that a crop cuts.

A bucket is one of several image sizes of about the same area. All images of a row have the same bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from mmalign.config import ImageSize
from mmalign.data.images import BadImage, image_size
from mmalign.data.pairs import ImagePair

WIDEST = 4  # largest ratio of a bucket's sides, as in SDXL (arXiv:2307.01952, appendix I)
STEPS = 16  # steps of a bucket's sides in the side of a square of the same area; 64 of 1024 pixels, as in SDXL


@cache
def buckets(size: ImageSize, multiple: int) -> tuple[ImageSize, ...]:
    """Return the buckets of the area of `size`, itself first.

    Args:
        size: the largest area of a bucket.
        multiple: the sides are multiples of this number of pixels.
    """
    area = size.width * size.height
    # A STEPS-th of the side of a square of this area, rounded up to the multiple
    step = -(-round(area**0.5) // (STEPS * multiple)) * multiple
    shapes = [size]
    for width in range(step, int((area * WIDEST) ** 0.5) + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= WIDEST * min(width, height):
            shapes.append(ImageSize(width, height))
    return tuple(dict.fromkeys(shapes))


def lost_area(image: ImageSize, shape: ImageSize) -> float:
    """Return the share of an image's area that a crop to the aspect ratio of `shape` cuts."""
    ratio = image.width * shape.height / (image.height * shape.width)
    return 1 - min(ratio, 1 / ratio)


@lru_cache(maxsize=2**16)
def choose_bucket(images: tuple[ImageSize, ...], shapes: tuple[ImageSize, ...]) -> ImageSize:
    """Return the bucket in which the image that loses the most loses the least; of equal ones the first."""
    return min(shapes, key=lambda shape: max(lost_area(image, shape) for image in images))


def measure(pairs: Iterable[ImagePair]) -> dict[str, ImageSize]:
    """Return the size of every readable image of pairs, by its key; only headers are decoded."""
    sizes = dict[str, ImageSize]()
    for pair in pairs:
        for ref in pair.images:
            if ref.key not in sizes:
                try:
                    sizes[ref.key] = image_size(ref)
                except BadImage:  # a loader skips and counts the pair
                    continue
    return sizes


@dataclass(frozen=True)
class Shapes:
    """Assignment of pairs to image sizes.

    Attributes:
        options: the possible sizes; without buckets the first is every pair's.
        sizes: the images' own sizes by key, for buckets.
    """

    options: tuple[ImageSize, ...]
    sizes: Mapping[str, ImageSize]

    def of(self, pair: ImagePair) -> ImageSize:
        """Return the size of all images of a row."""
        if len(self.options) == 1:
            return self.options[0]
        own = tuple(self.sizes[ref.key] for ref in pair.images if ref.key in self.sizes)
        return choose_bucket(own, self.options) if own else self.options[0]

    def of_all(self, pairs: Iterable[ImagePair]) -> list[ImageSize] | None:
        """Return the size of each pair's images; None if all have one size."""
        return [self.of(pair) for pair in pairs] if len(self.options) > 1 else None


def summarize_cuts(shapes: Shapes, sources: Iterable[Iterable[ImagePair]], *, pad: bool) -> Iterator[str]:
    """Yield a sentence on the area that crops cut or padding adds, one on enlarged images, and one on buckets."""
    lost, enlarged, used = list[tuple[float, str]](), list[tuple[float, str]](), Counter[ImageSize]()
    for pair in (pair for pairs in sources for pair in pairs):
        size = shapes.of(pair)
        used[size] += 1
        for ref in pair.images:
            if (own := shapes.sizes.get(ref.key)) is not None:
                lost.append((lost_area(own, size), ref.location))
                # Crops scale until the larger ratio is covered, padding until the smaller one is
                ratios = size.width / own.width, size.height / own.height
                enlarged.append((min(ratios) if pad else max(ratios), ref.location))
    if not lost:
        return
    # Areas: padding takes the same share that a crop would cut
    worst, where = max(lost)
    if worst > 0:
        mean = sum(share for share, _ in lost) / len(lost)
        what = "padding takes {:.1%} of an image" if pad else "crops cut {:.1%} of an image's area"
        yield f"{what.format(mean)} on average, at most {worst:.1%} ({where})"
    number, (most, where) = sum(scale > 1 for scale, _ in enlarged), max(enlarged)
    if number:
        yield f"{number:,} of {len(enlarged):,} images are enlarged, at most {most:.3g} times ({where})"
    if len(shapes.options) > 1:
        yield "buckets: " + ", ".join(f"{size} {number:,} pairs" for size, number in used.most_common())
