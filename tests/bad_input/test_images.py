"""Bad images cost their pair and are named; captions, small data and caches that do not fit."""

import io
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from tests.helpers import data_files, diffusion_models
from tests.helpers.commands import Commands, Content, contains, weights


def solid(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, made without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(), b"\0" * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BAD = {0: data_files.png(0)[:300], 1: b"", 2: solid(1, 1), 3: solid(20_000, 20_000)}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_bad_image_drops_its_pair_counted_and_named(
    cache: str, mmalign: Commands, content: Content, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, of zero bytes, of one pixel, of 400 million; no memory is taken for the last."""
    decoded: list[int] = []
    load = ImageFile.ImageFile.load

    def recorded(image: ImageFile.ImageFile) -> Any:
        decoded.append(image.size[0] * image.size[1])
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    data_files.pick_a_pic(pairs, bad=BAD)
    assert len(BAD[3]) < 100_000
    with pytest.raises(Image.DecompressionBombError, match="400000000 pixels"):
        Image.open(io.BytesIO(BAD[3]))
    printed = mmalign("train", content, f"data.cache='{cache}'", "data.max_bad=4", "train.steps=4")
    contains(
        printed, "4 images or pairs could not be used; their pairs were left out: pairs.parquet: row ", "and 1 more"
    )
    assert decoded and max(decoded) <= 400
    shutil.rmtree(content["output"])
    for row, reason in enumerate(
        ["is not a readable image", "has zero bytes", "is 1x1; expected", "is larger than 80,000,000 pixels"]
    ):
        alone = data_files.pick_a_pic(pairs.with_name(f"{row}.parquet"), bad={row: BAD[row]})
        data = f"data={{path: {alone}, cache: '{cache}', max_bad: 0}}"
        message = mmalign.refused("train", content, data, "train.batch_size=8")
        contains(
            message, f"more than data.max_bad = 0 rows and images are bad ({row}.parquet: row {row}, jpg_0: ", reason
        )


def test_max_bad_counts_rows_of_every_kind(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    """A missing file, a null prompt and a line that is no JSON are three; a tie is none."""
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(data_files.png(seed))
    good = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    path = data_files.write_jsonl(tmp_path / "a.jsonl", good, good | {"chosen": "2.png"}, good | {"prompt": None})
    path.write_text(path.read_text() + "\n{")
    for source in (f"data.path={path}", f"data={{path: {path}, format: folder, cache: 'off'}}"):
        message = mmalign.refused("train", content, source, "data.max_bad=2")
        contains(message, "more than data.max_bad = 2 rows and images are bad (a.jsonl: line 2: the image ")
    printed = mmalign("train", content, f"data.path={path}", "data.max_bad=3", "train.steps=1")
    contains(printed, "read as folder (prompt, chosen, rejected); ", "3 rows dropped (a.jsonl: line 2: ")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_too_many_bad_images_end_the_run(
    cache: str, mmalign: Commands, content: Content, pairs: Path, tmp_path: Path
) -> None:
    data_files.pick_a_pic(pairs, bad=BAD)
    message = mmalign.refused("train", content, f"data.cache='{cache}'", "data.max_bad=3", "train.steps=4")
    contains(message, "more than data.max_bad = 3 rows and images are bad (", "and 1 more", "raise data.max_bad")
    data_files.pick_a_pic(pairs, bad=dict.fromkeys(range(8), b"<html>not found</html>"))
    message = mmalign.refused("train", content, f"data.cache='{cache}'", f"output={tmp_path / 'none'}")
    contains(message, "none of 8 pairs can be used (pairs.parquet: row ", "and 5 more); repair them")
    assert "0x" not in message  # no object's address
    assert not list((tmp_path / "none").glob("checkpoint-*")) and not (tmp_path / "none" / "model").exists()


def test_held_out_pairs_are_looked_at_before_training_too(mmalign: Commands, content: Content, pairs: Path) -> None:
    """Else the first checkpoint would find out, and its updates be lost."""
    from mmalign.data.formats.images import open_pairs
    from mmalign.data.splits import split_by_group

    data_files.pick_a_pic(pairs, number=12)
    _, validation = split_by_group(open_pairs("pick_a_pic", str(pairs)), 0.4, 0)
    data_files.pick_a_pic(pairs, number=12, bad={int(pair.location.split("row ")[1]): b"" for pair in validation})
    message = mmalign.refused("train", content, "data.validation_fraction=0.4", "data.cache='off'")
    contains(message, f"none of {len(validation)} pairs can be used")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_caption_of_10_000_characters_is_cut_and_that_is_said(
    cache: str, mmalign: Commands, content: Content, pairs: Path
) -> None:
    rows = pq.read_table(pairs).to_pylist()
    rows[0]["caption"], rows[1]["caption"] = "x" * 10_000, "word " * 2000
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    contains(mmalign("train", content, f"data.cache='{cache}'"), "2 of 8 prompts exceed the text encoder's limit")


@pytest.mark.slow
def test_fewer_pairs_than_one_batch_are_enough(mmalign: Commands, content: Content) -> None:
    assert "8 pairs" in mmalign("train", content, "train.batch_size=32")


@pytest.mark.slow
@pytest.mark.parametrize("content_of", ["model", "resolution"])
def test_a_cache_of_another_model_or_resolution_is_left_as_it_is(
    content_of: str, mmalign: Commands, content: Content, tiny_sd2: Path, tmp_path: Path
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    mmalign("train", content, cache)
    before = weights(tmp_path / "cache")
    diffusion_models.stable_diffusion(tmp_path / "other", seed=1)
    mmalign.capfd.readouterr()
    setting = {"model": f"model.path={tmp_path / 'other'}", "resolution": "data.resolution=32"}[content_of]
    mmalign("train", content, cache, setting, f"output={tmp_path / 'second'}")
    after = weights(tmp_path / "cache")
    assert before and before.items() < after.items()


def test_rows_without_a_second_prompt_are_dropped(mmalign: Commands, content: Content, pairs: Path) -> None:
    method = "method={name: instruct_engine}"
    message = mmalign.refused("train", content, method)
    contains(message, "8 rows dropped: pairs.parquet: row 0: has no rejected_caption; ", "and 5 more")
    contains(message, "instruct_engine compares two images under two prompts; most methods take rows of one prompt")
    data_files.pick_a_pic(pairs, rejected={1: None, 4: ""})
    printed = mmalign("train", content, method)
    contains(
        printed, "6 pairs", "2 rows dropped (pairs.parquet: row 1: has no rejected_caption; pairs.parquet: row 4: "
    )


@pytest.mark.usefixtures("no_model")
def test_cross_pair_methods_need_two_pairs_per_batch(mmalign: Commands, content: Content) -> None:
    message = mmalign.refused("train", content, "method={name: cca}", "train.batch_size=1")
    assert message == (
        "train.batch_size: method.name: cca compares the pairs of a batch with one another; expected at least 2, got 1"
    )
