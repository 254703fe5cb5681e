"""What is put is found, by any process; what a crash, a full disk or another model left is not."""

import json
import os
import pickle
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmalign.atomic_io import CheckpointError, atomic_write
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.images import ImageCache
from tests.helpers.disk import full_disk

MODEL: dict[str, str | int | float] = {"model": "abc", "resolution": 64}


def item(value: float) -> dict[str, Tensor]:
    return {"mean": torch.full((2, 3), value), "sizes": torch.tensor([1, 2])}


def read(cache: ArrayCache, key: str) -> tuple[int, list[float]]:
    return os.getpid(), cache.get(key)["mean"].flatten().tolist()


def test_what_is_put_is_found_also_after_opening_again(tmp_path: Path) -> None:
    cache = ArrayCache.open(tmp_path / "cache", MODEL)
    cache.put({"a|b/64": item(1), "__metadata__": item(2)})
    cache.put({"ä": {"half": torch.ones(1, dtype=torch.bfloat16)}})
    cache.put({})
    for result in (cache, ArrayCache.open(tmp_path / "cache", MODEL)):
        assert len(result) == 3 and set(result) == {"a|b/64", "__metadata__", "ä"}
        assert result.get("a|b/64").keys() == {"mean", "sizes"}
        assert torch.equal(result.get("__metadata__")["mean"], torch.full((2, 3), 2.0))
        assert result.get("ä")["half"].dtype == torch.bfloat16
        assert result.missing(["x", "ä", "y", "x"]) == ["x", "y"] and "x" not in result
        with pytest.raises(KeyError):
            result.get("x")


def test_another_process_reads_through_its_own_handle(tmp_path: Path) -> None:
    cache = ArrayCache.open(tmp_path, MODEL)
    cache.put({"a": item(3)})
    assert read(cache, "a") == (os.getpid(), [3.0] * 6)
    assert pickle.loads(pickle.dumps(cache)).get("a")["sizes"].tolist() == [1, 2]
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        process, values = pool.submit(read, cache, "a").result()
    assert process != os.getpid() and values == [3.0] * 6


def test_two_writers_see_each_other_after_refresh(tmp_path: Path) -> None:
    first, second = ArrayCache.open(tmp_path, MODEL), ArrayCache.open(tmp_path, MODEL)
    first.put({"a": item(1)})
    second.put({"b": item(2)})
    assert "b" not in first
    first.refresh()
    second.refresh()
    assert len(first) == len(second) == 2 and first.get("b")["mean"][0, 0] == 2


def test_missing_keys_are_shared_evenly_by_ranks(tmp_path: Path) -> None:
    keys = [f"{n}" for n in (*range(7), 3, 0)]
    first, second = ArrayCache.open(tmp_path, MODEL), ArrayCache.open(tmp_path, MODEL)
    assert first.share(keys, rank=0, world_size=2) == ["0", "2", "4", "6"]
    first.put({"0": item(0), "2": item(2)})
    assert first.share(keys, rank=0, world_size=2) == ["4", "6"]
    second.refresh()
    assert second.share(keys, rank=1, world_size=2) == ["1", "3", "5"]
    assert second.share(keys, rank=0, world_size=1) == ["1", "3", "4", "5", "6"]


def test_another_model_has_another_folder(tmp_path: Path) -> None:
    """Each finds its own again, none finds another's, and the file beside the arrays says what they are of."""
    others: list[dict[str, str | int | float]] = [MODEL, MODEL | {"resolution": 128}, MODEL | {"dtype": "half"}]
    for number, of in enumerate(others):
        result = ArrayCache.open(tmp_path, of)
        assert "a" not in result
        result.put({"a": item(number)})
        assert json.loads((result.folder / "fingerprint.json").read_text()) == of
    for number, of in enumerate(others):
        assert read(ArrayCache.open(tmp_path, dict(reversed(of.items()))), "a")[1] == [number] * 6


def test_folder_of_another_fingerprint_is_refused(tmp_path: Path) -> None:
    folder, other_folder = (ArrayCache.open(tmp_path, MODEL | {"resolution": side}).folder for side in (64, 128))
    shutil.rmtree(other_folder)
    folder.rename(other_folder)
    with pytest.raises(ValueError, match="does not match its name: resolution is 64 there and 128 here; delete") as e:
        ArrayCache.open(tmp_path, MODEL | {"resolution": 128})
    assert "abc" not in str(e.value)


def test_a_file_and_a_strangers_folder_are_refused(tmp_path: Path) -> None:
    own = ArrayCache.open(tmp_path, MODEL).folder
    (own / "fingerprint.json").unlink()
    (own / "photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        ArrayCache.open(tmp_path, MODEL)
    with pytest.raises(ValueError, match="is a file"):
        ArrayCache.open(own / "photo.jpg", MODEL)
    assert [p.name for p in own.iterdir()] == ["photo.jpg"]
    shutil.rmtree(own)
    own.write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        ArrayCache.open(tmp_path, MODEL)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_shard_cut_short_is_removed_and_the_others_kept(tmp_path: Path, kept: int) -> None:
    cache = ArrayCache.open(tmp_path, MODEL)
    cache.put({"a": item(1)})
    (whole,) = cache.folder.glob("*.safetensors")
    cut = cache.folder / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:kept])
    again = ArrayCache.open(tmp_path, MODEL)
    assert set(again) == {"a"} and not cut.exists() and whole.exists()


@pytest.mark.parametrize("age", [-(10**6), 0, 10**6])
def test_what_a_killed_process_left_is_removed_at_any_time(age: int, tmp_path: Path) -> None:
    """Clocks do not matter: the part is removed as soon as no process writes to the folder."""
    cache = ArrayCache.open(tmp_path, MODEL)
    with pytest.raises(KeyboardInterrupt), atomic_write(cache.folder / "a.safetensors", shared=True) as part:
        part.write_bytes(b"half a shard")
        left = part.read_bytes()
        os.utime(part, (time.time() + age,) * 2)
        assert len(ArrayCache.open(tmp_path, MODEL)) == 0 and part.exists()  # its writer is alive
        raise KeyboardInterrupt
    part.write_bytes(left)
    os.utime(part, (time.time() + age,) * 2)
    assert len(ArrayCache.open(tmp_path, MODEL)) == 0 and not part.exists()


def test_an_image_cache_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, {"model": "abc"})
    left, other = cache.folder / ".00.png.mmalign-0123-part", cache.folder / "mine.part"
    for path in (left, other):
        path.write_bytes(b"half an image")
    ImageCache(tmp_path, {"model": "abc"})
    assert not left.exists() and other.exists()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    cache = ArrayCache.open(tmp_path, MODEL)
    cache.put({"a": item(1)})
    with (
        full_disk(10),
        pytest.raises(CheckpointError, match=r"could not be written \(.*; [\d,.]+ MB are free") as error,
    ):
        cache.put({"b": item(2)})
    assert str(tmp_path) in str(error.value)
    assert not list(cache.folder.glob(".*-part")) and set(cache) == set(ArrayCache.open(tmp_path, MODEL)) == {"a"}
