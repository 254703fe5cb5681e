"""Rows of strangers can name no file outside their folder, and nothing but images is copied."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.formats.image_files import MAX_IMAGE_BYTES
from mmalign.data.formats.images import open_pairs
from mmalign.data.formats.responses import open_responses
from mmalign.data.images import BadImage, decode
from mmalign.synthesis.write_responses import SynthesizedPair, write_pairs
from tests.helpers import data_files

TEXTS = {"prompt": "What is it?", "chosen": "A fox.", "rejected": "A dog."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of rows beside a secret."""
    (tmp_path / "secret.txt").write_text("SECRET-KEY-MATERIAL")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "0.png").write_bytes(data_files.png(0))
    return folder


def json_rows(folder: Path, image: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({**TEXTS, "images": [image]}))
    return str(path)


def table_rows(folder: Path, image: str) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**TEXTS, "images": [{"bytes": None, "path": image}]}], SCHEMA), path)
    return str(path)


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([*((name, pa.string()) for name in TEXTS), ("images", pa.list_(_IMAGE))])


@pytest.mark.parametrize("write", [json_rows, table_rows])
@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt"])
@pytest.mark.parametrize("named", [False, True])
def test_no_row_leads_out_of_the_folder(write: Any, name: str, named: bool, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.\w+: (line|row) \d.* is outside .*data\.images") as raised:
        list(open_responses("trl", write(folder, name), images=folder if named else None))
    assert json.dumps(name) in str(raised.value)


@pytest.mark.parametrize("write", [json_rows, table_rows])
def test_a_folder_that_the_user_named_holds_its_paths(write: Any, folder: Path) -> None:
    for name in ("rows/0.png", "rows/../rows/0.png", str(folder / "0.png")):
        (pair,) = open_responses("trl", write(folder, name), images=folder.parent)
        assert decode(pair.images[0]).size


def test_image_pairs_stay_in_their_folder(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "0.png", "rejected": "../secret.txt"}))
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1: the image .* is outside"):
        open_pairs("folder", str(folder / "rows.jsonl"))


@pytest.mark.parametrize("name", ["secret.txt", "link"])
def test_nothing_but_an_image_is_copied(name: str, folder: Path) -> None:
    (folder / "secret.txt").write_text("SECRET-KEY-MATERIAL")
    (folder / "link").symlink_to(folder.parent / "secret.txt")
    for write in (json_rows, table_rows):
        (pair,) = open_responses("trl", write(folder, name))
        with pytest.raises(BadImage, match="is not a readable image"):
            write_pairs(
                folder / "made.parquet", [SynthesizedPair(pair, "no", "", None, {})], suffix=".parquet", images=folder
            )


def test_pipes_and_files_too_large_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with (folder / "large.png").open("wb") as large:
        large.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(ValueError, match="not a regular file"):
        list(open_responses("trl", table_rows(folder, "pipe.png")))
    with pytest.raises(ValueError, match="more than"):
        list(open_responses("trl", table_rows(folder, "large.png")))
    with pytest.raises(ValueError, match=r"line 1: the image .* cannot be read .*more than"):
        open_responses("trl", json_rows(folder, "large.png"))
    (pair,) = open_responses("trl", json_rows(folder, "0.png"))
    image = pair.images[0]
    (folder / "0.png").unlink()
    os.mkfifo(folder / "0.png")  # after the index was made
    with pytest.raises(BadImage, match="not a regular file"):
        decode(image)
