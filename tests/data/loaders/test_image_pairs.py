"""The same batches for any number of workers, from any batch on, decoded or cached, whatever is broken."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.config import ImageSize
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.latents import ImageViews
from mmalign.data.formats import tables
from mmalign.data.formats.images import open_pairs
from mmalign.data.images import ImageTransform, decode
from mmalign.data.loaders.image_pairs import ImagePairBatch, ImagePairLoader, ImagePairReader
from mmalign.data.loaders.loader import Loader
from mmalign.data.pairs import ImageRef, Pairs, SkippedRow
from mmalign.data.shapes import Shapes
from tests.helpers import data_files

VIEW = ImageTransform("random", flip=True)
CENTER = ImageTransform("center", flip=True)
SQUARE = Shapes((ImageSize(16, 16),), {})


def make(folder: Path, number: int, bad: tuple[int, ...] = ()) -> Pairs:
    """Pair i compares two noises of 20 x 16 and 16 x 24; the chosen image of the pairs in `bad` is cut short."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(number):
        for side, shape in (("chosen", (16, 20, 3)), ("rejected", (24, 16, 3))):
            path = folder / f"{i}-{side}.png"
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
            if i in bad and side == "chosen":
                path.write_bytes(path.read_bytes()[:200])
        records.append({"prompt": f"prompt {i}", "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    return open_pairs("folder", str(folder))


def uncached(
    pairs: Pairs, transform: ImageTransform, cache: ArrayCache, *, num_workers: int = 0, **share: int
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]] | SkippedRow]:
    """Each image's views that the cache lacks."""
    views = ImageViews(pairs, SQUARE, transform)
    return views.read(cache, views.uncached(cache, **share), num_workers=num_workers)


def keys_of(*given: Any, **options: Any) -> list[str]:
    return [key for views in uncached(*given, **options) if not isinstance(views, SkippedRow) for key in views]


def fill(folder: Path, pairs: Pairs, transform: ImageTransform) -> tuple[ArrayCache, list[SkippedRow]]:
    """Stores the pixels themselves, as an encoder would store latents."""
    cache, bad = ArrayCache.open(folder, {"model": "none"}), list[SkippedRow]()
    for views in uncached(pairs, transform, cache):
        if isinstance(views, SkippedRow):
            bad.append(views)
        else:
            cache.put({key: {"mean": pixels, "sizes": sizes} for key, (pixels, sizes) in views.items()})
    return cache, bad


def load(
    pairs: Pairs, *, seed: int, transform: ImageTransform, cache: ArrayCache | None = None, **options: Any
) -> ImagePairLoader:
    return Loader(pairs, ImagePairReader(SQUARE, transform, seed, cache), seed=seed, **options)


def images(batch: ImagePairBatch) -> torch.Tensor:
    """What `fill` has stored, or the decoded images: the same thing."""
    if batch.pixels is not None:
        return batch.pixels
    assert batch.arrays is not None
    return batch.arrays["mean"]


def equal(a: ImagePairBatch, b: ImagePairBatch) -> bool:
    return (
        (a.rows, a.prompts) == (b.rows, b.prompts)
        and torch.equal(images(a), images(b))
        and torch.equal(a.sizes, b.sizes)
        and torch.equal(a.weights, b.weights)
    )


def test_an_epoch_shows_every_pair_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    loader = load(make(tmp_path, 8), batch_size=2, seed=0, transform=VIEW)
    epochs = [[p for batch in loader.batches(e) for p in batch.prompts] for e in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"prompt {i}" for i in range(8)]
    assert epochs[0] == epochs[2] != epochs[1]
    other_loader = load(loader.pairs, batch_size=2, seed=1, transform=VIEW)
    assert [p for batch in other_loader.batches(0) for p in batch.prompts] != epochs[0]


def test_a_batch_has_chosen_images_first(tmp_path: Path) -> None:
    (batch,) = load(make(tmp_path, 3), batch_size=3, seed=0, transform=ImageTransform()).batches(0)
    assert batch.pixels is not None and batch.pixels.shape == (6, 3, 16, 16) and batch.arrays is None
    assert batch.sizes.tolist() == [[16, 20, 0, 2, 16, 16]] * 3 + [[24, 16, 4, 0, 16, 16]] * 3
    first = Image.open(tmp_path / f"{batch.prompts[0].split()[1]}-rejected.png").crop((0, 4, 16, 20))
    assert torch.equal(
        ((batch.pixels[3] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(first))
    )
    assert batch.weights.tolist() == [1, 1, 1] and batch.weights.dtype == torch.float32


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    pairs = make(tmp_path, 9, bad=(4,))
    alone = list(load(pairs, batch_size=2, seed=3, transform=VIEW).batches(1))
    before = torch.get_rng_state()
    helped = list(load(pairs, batch_size=2, seed=3, transform=VIEW, num_workers=workers).batches(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == 4 and all(map(equal, alone, helped))


def test_resuming_equals_not_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make(tmp_path, 8)
    loader = load(pairs, batch_size=2, seed=0, transform=VIEW)
    whole = list(loader.batches(5))
    reads: list[str] = []

    def counted(ref: ImageRef) -> Image.Image:
        reads.append(ref.location)
        return decode(ref)

    monkeypatch.setattr("mmalign.data.loaders.image_pairs.decode", counted)
    rest = list(loader.batches(5, start=3))
    assert len(rest) == 1 and equal(rest[0], whole[3]) and len(reads) == 4
    assert list(loader.batches(5, start=4)) == []


def test_ranks_share_the_batches_of_one_process(tmp_path: Path) -> None:
    """Two ranks of 2 see the halves of what one process of 4 sees, crops and flips included."""
    pairs = make(tmp_path, 9)
    single_process = list(load(pairs, batch_size=4, seed=0, transform=VIEW).batches(0))
    ranks = [list(load(pairs, batch_size=2, seed=0, transform=VIEW, rank=r, world_size=2).batches(0)) for r in (0, 1)]
    assert len(single_process) == len(ranks[0]) == len(ranks[1]) == 2
    for whole, first, second in zip(single_process, *ranks, strict=True):
        assert whole.rows == first.rows + second.rows
        assert whole.pixels is not None and first.pixels is not None and second.pixels is not None
        assert torch.equal(whole.pixels[:2], first.pixels[:2]) and torch.equal(whole.pixels[6:], second.pixels[2:])


def test_too_few_pairs_are_padded_with_weight_0_on_every_rank(tmp_path: Path) -> None:
    pairs = make(tmp_path, 3)
    batches = [
        list(load(pairs, batch_size=2, seed=0, transform=VIEW, rank=r, world_size=4).batches(0)) for r in range(4)
    ]
    assert [b[0].weights.tolist() for b in batches] == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert all(len(b) == 1 and len(b[0].rows) == 2 for b in batches)


def test_evaluation_keeps_the_last_batch(tmp_path: Path) -> None:
    pairs = make(tmp_path, 5)
    loader = load(pairs, batch_size=2, seed=0, transform=VIEW, keep_last=True)
    batches = list(loader.batches(0))
    assert len(loader) == len(batches) == 3 and batches[2].weights.tolist() == [1, 0]
    counted = [p for b in batches for p, w in zip(b.prompts, b.weights.tolist(), strict=True) if w]
    assert sorted(counted) == [f"prompt {i}" for i in range(5)]


def test_flip_is_shared_by_a_pair_and_hits_half(tmp_path: Path) -> None:
    pairs = make(tmp_path, 16)
    plain = {r: b for b in load(pairs, batch_size=1, seed=0, transform=ImageTransform()).batches(0) for r in b.rows}
    flipped = 0
    for batch in load(pairs, batch_size=1, seed=0, transform=CENTER).batches(0):
        as_is = plain[batch.rows[0]].pixels
        assert as_is is not None and batch.pixels is not None
        mirrored = not torch.equal(batch.pixels, as_is)
        assert torch.equal(batch.pixels, as_is.flip(-1) if mirrored else as_is)
        flipped += mirrored
    assert 1 <= flipped <= 15


def test_bad_pair_gets_weight_0_and_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    good = list(load(make(tmp_path / "good", 6), batch_size=3, seed=0, transform=VIEW).batches(0))
    loader = load(make(tmp_path / "bad", 6, bad=(2,)), batch_size=3, seed=0, transform=VIEW)
    batches = list(loader.batches(0))
    assert [b.prompts for b in batches] == [b.prompts for b in good]
    weights = {p: w for b in batches for p, w in zip(b.prompts, b.weights.tolist(), strict=True)}
    assert [p for p, w in weights.items() if w == 0] == ["prompt 2"]
    for a, b in zip(good, batches, strict=True):
        assert a.pixels is not None and b.pixels is not None
        keep = b.weights.repeat(2) > 0
        assert torch.equal(a.pixels[keep], b.pixels[keep])
    list(loader.batches(1))
    (dropped,) = loader.skipped
    assert dropped.location == "pairs.jsonl: line 3, chosen (2-chosen.png)" and "not a readable image" in dropped.reason


def test_a_batch_of_bad_pairs_is_empty_but_there(tmp_path: Path) -> None:
    loader = load(make(tmp_path, 4, bad=(0, 1, 2)), batch_size=1, seed=0, transform=VIEW)
    batches = list(loader.batches(0))
    assert sum(b.weights.sum() for b in batches) == 1 and len(batches) == 4
    assert all(b.pixels is not None and b.pixels.shape == (2, 3, 16, 16) for b in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_end_the_run(tmp_path: Path, workers: int) -> None:
    pairs = make(tmp_path, 4, bad=(0, 1))
    list(load(pairs, batch_size=1, seed=0, transform=VIEW, max_bad=2, num_workers=workers).batches(0))
    with pytest.raises(ValueError, match=r"more than data.max_bad = 1 rows and images are bad \(pairs.jsonl: line"):
        list(load(pairs, batch_size=1, seed=0, transform=VIEW, max_bad=1, num_workers=workers).batches(0))
    with pytest.raises(ValueError, match="none of 2 pairs can be used"):
        list(load(pairs[:2], batch_size=1, seed=0, transform=VIEW, num_workers=workers).batches(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_batches_are_the_decoded_ones(tmp_path: Path, workers: int) -> None:
    pairs = make(tmp_path, 6, bad=(3,))
    cache, bad = fill(tmp_path / "cache", pairs, CENTER)
    assert len(cache) == 2 * 11 and [d.location for d in bad] == ["pairs.jsonl: line 4, chosen (3-chosen.png)"]
    decoded = list(load(pairs, batch_size=2, seed=0, transform=CENTER).batches(2))
    cached = list(load(pairs, batch_size=2, seed=0, transform=CENTER, cache=cache, num_workers=workers).batches(2))
    assert len(cached) == 3 and all(map(equal, decoded, cached))
    assert cached[0].pixels is None and cached[0].arrays is not None and cached[0].arrays.keys() == {"mean"}
    alone = load(pairs.select([3, 0]), batch_size=1, seed=0, transform=CENTER, cache=cache)
    assert {tuple(b.weights.tolist()) for b in alone.batches(0)} == {(0.0,), (1.0,)}


def test_images_without_ids_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling reads each image twice, for its key and its latents; epochs from the cache read none."""
    path = data_files.pick_a_pic(tmp_path / "pairs.parquet", 8)
    pq.write_table(pq.read_table(path).drop_columns(["image_0_uid", "image_1_uid"]), path)
    pairs, reads = open_pairs("pick_a_pic", str(path)), list[int]()
    cell = tables.TableRows._cell
    monkeypatch.setattr(tables.TableRows, "_cell", lambda rows, place: reads.append(place[0]) or cell(rows, place))
    cache, _ = fill(tmp_path / "cache", pairs, ImageTransform())
    assert sorted(reads) == sorted([*range(8)] * 4)
    loader = load(pairs, batch_size=2, seed=0, transform=ImageTransform(), cache=cache)
    loader.check_readable()
    keys = [{key for batch in loader.batches(epoch) for key in batch.keys} for epoch in range(3)]
    assert len(keys[0]) == 8 and keys[0] == keys[1] == keys[2] and len(reads) == 4 * 8


def test_encoding_resumes_and_is_shared_by_ranks(tmp_path: Path) -> None:
    pairs = make(tmp_path, 6)
    cache = ArrayCache.open(tmp_path / "cache", {"model": "none"})
    shares = [set(keys_of(pairs, CENTER, cache, rank=r, world_size=2)) for r in (0, 1)]
    assert [len(share) for share in shares] == [12, 12] and not shares[0] & shares[1]
    views = next(iter(uncached(pairs, CENTER, cache)))
    assert not isinstance(views, SkippedRow)
    first, (pixels, sizes) = next(iter(views.items()))
    cache.put({first: {"mean": pixels, "sizes": sizes}})
    rest = keys_of(pairs, CENTER, cache, num_workers=1)
    assert len(rest) == len(set(rest)) == 23 and first not in rest
    # A rank that looks later, when some are stored, still has its own share and no one else's.
    assert set(keys_of(pairs, CENTER, cache, rank=1, world_size=2)) == shares[1] - {first}


def test_an_image_of_many_pairs_is_encoded_once(tmp_path: Path) -> None:
    make(tmp_path, 2)
    record = {"prompt": "a", "image_path": ["0-chosen.png", "0-rejected.png", "1-chosen.png"], "rank": [1, 2, 3]}
    (tmp_path / "ranks.jsonl").write_text(json.dumps(record))
    pairs = open_pairs("rankings", str(tmp_path / "ranks.jsonl"))
    cache = ArrayCache.open(tmp_path / "cache", {})
    assert len(pairs) == 3 and len(keys_of(pairs, ImageTransform(), cache)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_lacks_a_good_image_is_refused(tmp_path: Path, workers: int) -> None:
    pairs = make(tmp_path, 4)
    empty = ArrayCache.open(tmp_path / "empty", {})
    partial_cache, _ = fill(tmp_path / "some", pairs[:3], CENTER)
    for cache, line in ((empty, r"\d"), (partial_cache, "4")):
        with pytest.raises(ValueError, match=rf"data.cache: .* lacks pairs.jsonl: line {line}, .*; encode the images"):
            list(load(pairs, batch_size=1, seed=0, transform=CENTER, cache=cache, num_workers=workers).batches(0))
    with pytest.raises(ValueError, match="random crops change every epoch"):
        load(pairs, batch_size=1, seed=0, transform=VIEW, cache=partial_cache)


def test_a_long_caption_passes_whole(tmp_path: Path) -> None:
    make(tmp_path, 1)
    prompt = "ä " * 5000
    record = {"prompt": prompt, "chosen": "0-chosen.png", "rejected": "0-rejected.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    (batch,) = load(open_pairs("folder", str(tmp_path)), batch_size=1, seed=0, transform=VIEW).batches(0)
    assert batch.prompts == [prompt]
