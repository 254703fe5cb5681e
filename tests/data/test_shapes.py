"""Aspect buckets: one shape for both images of a pair, one shape in a batch, and what is cut is counted."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import ImageSize
from mmalign.data.formats.images import open_pairs
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.image_pairs import ImagePairLoader, ImagePairReader
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.data.pairs import Pairs
from mmalign.data.shapes import Shapes, buckets, choose_bucket, lost_area, measure, summarize_cuts

SQUARE = ImageSize(64, 64)


def make(folder: Path, sizes: list[tuple[ImageSize, ImageSize]]) -> Pairs:
    """Write pairs of noise images with these sizes, chosen and rejected."""
    rng, records = np.random.default_rng(0), []
    for i, pair in enumerate(sizes):
        record = {"prompt": f"prompt {i}"}
        for side, size in zip(("chosen", "rejected"), pair, strict=True):
            record[side] = f"{i}-{side}.png"
            pixels = rng.integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / record[side])
        records.append(record)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    return open_pairs("folder", str(folder))


def load(pairs: Pairs, options: tuple[ImageSize, ...], **more: int) -> ImagePairLoader:
    shapes = Shapes(options, measure(pairs))
    reader = ImagePairReader(shapes, ImageTransform(), seed=0)
    return Loader(pairs, reader, seed=0, shapes=shapes.of_all(pairs), **more)


def test_buckets_of_sdxl_are_in_the_list() -> None:
    """Four of the sizes that SDXL was trained on (arXiv:2307.01952, appendix I)."""
    shapes = buckets(ImageSize(1024, 1024), 8)
    assert shapes[0] == (1024, 1024) and {(1216, 832), (832, 1216), (1344, 768), (2048, 512)} <= set(shapes)
    assert all(w % 64 == h % 64 == 0 and w * h <= 1024**2 and max(w, h) <= 4 * min(w, h) for w, h in shapes)


@pytest.mark.parametrize(("size", "multiple"), [(SQUARE, 8), (SQUARE, 32), (ImageSize(96, 64), 16)])
def test_buckets_keep_the_area_and_the_multiple(size: ImageSize, multiple: int) -> None:
    shapes = buckets(size, multiple)
    assert shapes[0] == size and len(shapes) > 1
    assert all(w % multiple == h % multiple == 0 and w * h <= size.width * size.height for w, h in shapes)


def test_pair_has_the_bucket_of_the_larger_loss() -> None:
    """A square and a 2:1 image: 3:2 cuts a third of the square and a quarter of the other; the square bucket a half."""
    options = (ImageSize(64, 64), ImageSize(96, 64), ImageSize(128, 64))
    square, wide = ImageSize(500, 500), ImageSize(400, 200)
    assert [lost_area(wide, shape) for shape in options] == pytest.approx([1 / 2, 1 / 4, 0])
    assert choose_bucket((square, wide), options) == (96, 64)
    assert choose_bucket((wide, wide), options) == (128, 64)


def test_batches_have_one_shape_and_every_pair_is_read(tmp_path: Path) -> None:
    wide, tall, square = ImageSize(60, 30), ImageSize(30, 60), ImageSize(40, 40)
    pairs = make(tmp_path, [(wide, wide)] * 5 + [(tall, wide)] * 2 + [(tall, tall)] + [(square, square)] * 3)
    loader, prompts = load(pairs, buckets(SQUARE, 8), batch_size=2), Counter[str]()
    batches = list(loader.batches(0))
    assert len(batches) == len(loader) == 2 + 2 + 1  # wide; square, with the two mixed pairs; tall, padded
    for batch in batches:
        assert batch.pixels is not None and batch.pixels.shape[1] == 3
        height, width = batch.pixels.shape[2:]
        assert batch.sizes[:, 4:].tolist() == [[height, width]] * 4
        prompts.update(p for p, weight in zip(batch.prompts, batch.weights.tolist(), strict=True) if weight)
    assert set(prompts.values()) == {1} and len(prompts) == 4 + 4 + 1  # full buckets drop their rest


@pytest.mark.parametrize("keep_last", [False, True])
def test_square_images_make_the_batches_of_one_size(tmp_path: Path, keep_last: bool) -> None:
    pairs = make(tmp_path, [(ImageSize(70, 70), ImageSize(64, 64))] * 5)
    bucketed, plain = (load(pairs, o, batch_size=2, keep_last=keep_last) for o in (buckets(SQUARE, 8), (SQUARE,)))
    for a, b in zip(bucketed.batches(3), plain.batches(3), strict=True):
        assert a.pixels is not None and b.pixels is not None
        assert a.rows == b.rows and torch.equal(a.pixels, b.pixels) and torch.equal(a.weights, b.weights)
        assert torch.equal(a.sizes, b.sizes)


@pytest.mark.parametrize("keep_last", [False, True])
def test_processes_share_a_global_batch_of_one_shape(keep_last: bool) -> None:
    shapes = [str(number % 3) for number in range(40)]
    ranks = [EpochSampler(40, 3, 0, rank, 2, keep_last, shapes) for rank in (0, 1)]
    for first, second in zip(ranks[0].plan(1), ranks[1].plan(1), strict=True):
        assert len(first) == len(second) == 3
        assert len({shapes[number] for number, _ in first + second}) == 1
    numbers = [n for sampler in ranks for batch in sampler.plan(1) for n, weight in batch if weight]
    assert len(numbers) == len(set(numbers)) == (40 if keep_last else 36)
    assert sorted(numbers) == [number for _, number in ranks[0].taken(2 * len(ranks[0]), 8) if _ == 1]


def test_cuts_are_counted(tmp_path: Path) -> None:
    pairs = make(tmp_path, [(ImageSize(80, 40), ImageSize(80, 80))])
    shapes = Shapes((SQUARE,), measure(pairs))
    crops, enlarged = summarize_cuts(shapes, [pairs], pad=False)
    assert crops == "crops cut 25.0% of an image's area on average, at most 50.0% (" + pairs[0].chosen.location + ")"
    assert enlarged == f"1 of 2 images are enlarged, at most 1.6 times ({pairs[0].chosen.location})"
    (padding,) = summarize_cuts(shapes, [pairs], pad=True)
    assert padding.startswith("padding takes 25.0% of an image on average, at most 50.0%")
