"""Files of every kind give the same pairs; what is no row is dropped, and what is no source is refused."""

import gzip
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.formats.responses import open_responses
from mmalign.data.pairs import Pairs
from tests.helpers import data_files
from tests.helpers.sources import (
    PROMPTS,
    ROWS,
    STRUCT,
    add,
    as_csv,
    as_lines,
    image_folder,
    parquet,
    path_of,
    records,
    save_to_disk,
    seeds,
    sides,
    sides_with_metadata,
    uri,
    webdataset,
    write_images,
    write_text,
)

KINDS: dict[str, Callable[[Path], Path]] = {
    "parquet of bytes": parquet(data_files.png),
    "parquet of structs": parquet(lambda seed: {"bytes": data_files.png(seed), "path": "x.png"}, STRUCT),
    "parquet of structs of paths": parquet(lambda seed: {"bytes": None, "path": path_of(seed)}, STRUCT),
    "parquet of paths": parquet(path_of),
    "parquet of data URIs": parquet(uri),
    "save_to_disk": save_to_disk,
    "lines": write_text("pairs.jsonl", lambda: as_lines(records(path_of))),
    "lines with a mark": write_text("pairs.jsonl", lambda: b"\xef\xbb\xbf" + as_lines(records(path_of))),
    "lines of data URIs": write_text("pairs.ndjson", lambda: as_lines(records(uri))),
    "lines, packed": write_text("pairs.jsonl.gz", lambda: as_lines(records(path_of))),
    "lines in .json": write_text("pairs.json", lambda: as_lines(records(path_of))),
    "a list": write_text("pairs.json", lambda: b"\xef\xbb\xbf" + json.dumps(records(path_of)).encode()),
    "a list, packed": write_text("pairs.json.gz", lambda: json.dumps(records(path_of)).encode()),
    "a list in .jsonl": write_text("pairs.jsonl", lambda: json.dumps(records(path_of), indent=1).encode()),
    "file URIs": write_text("pairs.jsonl", lambda: as_lines(records(lambda seed: f"file://{path_of(seed)}"))),
    "paths of Windows": write_text("pairs.jsonl", lambda: as_lines(records(lambda seed: f"images\\{seed}.png"))),
    "CSV": write_text("pairs.csv", lambda: b"\xef\xbb\xbf" + as_csv(records(path_of))),
    "CSV of data URIs": write_text("pairs.csv", lambda: as_csv(records(uri))),
    "CSV with semicolons": write_text("pairs.CSV", lambda: as_csv(records(path_of), ";")),
    "CSV, packed": write_text("pairs.csv.gz", lambda: as_csv(records(path_of))),
    "TSV": write_text("pairs.tsv", lambda: as_csv(records(path_of), "\t")),
    "image folder": image_folder,
    "sides": sides,
    "sides with metadata": sides_with_metadata,
    "webdataset": webdataset,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_pairs(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path / "data")
    check_source("auto", str(path))
    pairs = open_pairs("auto", str(path))
    assert seeds(pairs) == ROWS and not pairs.skipped
    assert "read as folder (prompt" in pairs.summary()
    assert seeds(open_pairs("folder", str(path))) == ROWS
    folder = path if path.is_dir() else path.parent
    assert seeds(open_pairs("auto", str(folder))) == ROWS  # the folder's only source


@pytest.mark.parametrize(("of_file", "of_row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_a_character_of_its_own(
    of_file: Literal["NFC", "NFD"], of_row: Literal["NFC", "NFD"], tmp_path: Path
) -> None:
    write_images(tmp_path)
    folder, named = (unicodedata.normalize(form, "caf\u00e9") for form in (of_file, of_row))
    (tmp_path / "images").rename(tmp_path / folder)
    (tmp_path / "pairs.jsonl").write_bytes(as_lines(records(lambda seed: f"{named}/{seed}.png")))
    assert seeds(open_pairs("auto", str(tmp_path / "pairs.jsonl"))) == ROWS


def test_archives_may_have_pick_a_pic_s_columns(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a/7.jpg_0", data_files.png(0))
        add(archive, "a/7.jpg_1", data_files.png(1))
        add(archive, "a/7.json", json.dumps({"caption": "x", "label_0": 0, "label_1": 1}).encode())
    assert seeds(open_pairs("auto", str(tmp_path / "a.tar"))) == [("x", 1, 0)]


def test_splits_are_asked_for(tmp_path: Path) -> None:
    data = Dataset.from_list(records(data_files.png))
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        sides(tmp_path / "sides" / split)
        write_images(tmp_path / "folder" / split)
        (tmp_path / "folder" / split / "metadata.jsonl").write_bytes(as_lines(records(path_of)))
        (tmp_path / f"{split}.csv").write_bytes(as_csv(records(uri)))
    for path in (tmp_path / "saved", tmp_path / "sides", tmp_path / "folder", tmp_path):
        with pytest.raises(
            ValueError, match=r"data.split: .* has files of several splits; expected one of test, train"
        ):
            check_source("auto", str(path))
    assert len(open_pairs("auto", str(tmp_path / "saved"), split="train")) == 3
    assert len(open_pairs("auto", str(tmp_path / "saved"), split="test")) == 1
    assert len(open_pairs("auto", str(tmp_path / "sides"), split="test")) == 3
    assert len(open_pairs("auto", str(tmp_path / "folder"), split="train")) == 3
    assert len(open_pairs("auto", str(tmp_path / "t*.csv"))) == 6  # a glob is explicit
    assert len(open_pairs("auto", str(tmp_path / "train.csv"), split="validation")) == 3


def test_brackets_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a b [v2]"
    folder.mkdir()
    for name, seed in (("set1", 0), ("set[12]", 2)):
        rows = [{"prompt": name, "chosen": data_files.png(seed), "rejected": data_files.png(seed + 1)}]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    assert seeds(open_pairs("auto", str(folder / "set[12].parquet"))) == [("set[12]", 2, 3)]
    assert len(open_pairs("auto", str(folder))) == 2


def test_columns_of_later_files_are_read(tmp_path: Path) -> None:
    rows = records(data_files.png)
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([rows[1] | {"rejected_prompt": "b"}]), tmp_path / "b.parquet")
    for pairs in (open_pairs("auto", str(tmp_path)), open_pairs("folder", str(tmp_path))):
        assert [pair.rejected_prompt for pair in pairs] == ["", "b"]
    for name, flags in (("a", {}), ("b", {"has_label": False})):
        row = {"caption": name, "jpg_0": data_files.png(0), "jpg_1": data_files.png(1), "label_0": 1, "label_1": 0}
        pq.write_table(pa.Table.from_pylist([row | flags]), tmp_path / f"{name}.parquet")
    pairs = open_pairs("pick_a_pic", str(tmp_path))
    assert [str(row) for row in pairs.skipped] == ["b.parquet: row 0: has_label is false"] and len(pairs) == 1


def latin(name: str) -> bytes:
    rows = as_csv(records(path_of)) if name.endswith("csv") else as_lines(records(path_of))
    return rows.decode().encode("latin-1")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / name).write_bytes(latin(name))
    pairs = open_pairs("auto", str(tmp_path / name))
    assert [row for row, *_ in seeds(pairs)] == [PROMPTS[0], PROMPTS[2]]
    (skipped,) = pairs.skipped
    assert "is not in UTF-8" in skipped.reason and "Latin-1" in skipped.reason
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (tmp_path / name).write_bytes(latin(name).decode("latin-1").encode(encoding))
        with pytest.raises(ValueError, match=r"is in UTF-(16|32); save it in UTF-8"):
            check_source("auto", str(tmp_path / name))


def test_bad_rows_of_text_are_dropped_with_their_line(tmp_path: Path) -> None:
    write_images(tmp_path)
    good = as_lines(records(path_of)).split(b"\n")
    bad = [b'{"prompt": "a', b"[1]", b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', b"\xff\xfe{}"]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([*good[:1], *bad, *good[1:]]))
    pairs = open_pairs("auto", str(tmp_path / "pairs.jsonl"))
    assert seeds(pairs) == ROWS and [row.location for row in pairs.skipped] == [
        f"pairs.jsonl: line {n}" for n in range(2, 6)
    ]
    lines = as_csv(records(path_of)).split(b"\r\n")
    (tmp_path / "pairs.csv").write_bytes(
        b"\r\n".join([*lines[:2], b"a,b", b"a,b,c,d", *lines[2:-1], b'"torn,images/0.png'])
    )
    pairs = open_pairs("auto", str(tmp_path / "pairs.csv"))
    assert seeds(pairs) == ROWS
    assert ["2 fields" in pairs.skipped[0].reason, "4 fields" in pairs.skipped[1].reason] == [True, True]
    assert len(pairs.skipped) == 3 and "is not a row of CSV" in pairs.skipped[2].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK", "unpack it"),
        ("a.tar.gz", b"\x1f\x8b", "unpack it"),
        ("a.xlsx", b"PK", "save it as CSV"),
        ("a.feather", b"ARROW1", "save it as Parquet"),
        ("a.arrow", b"ARROW1\0\0", "is a Feather file, .* save it as Parquet"),
        ("a.sqlite", b"SQLite format 3", "save its rows as JSON lines"),
        ("a.pkl", b"\x80", "a pickle can run any code"),
        ("a.tar", b"no tar" * 200, "is not a readable tar"),
        ("a.jsonl.gz", b"no gzip", "is not a gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 1000, mtime=0)[:-20], "cut short or damaged"),
        ("a.arrow", b"no arrow", "is not a readable Arrow file"),
        ("a.csv", b"prompt,chosen,chosen\n1,2,3", "names a column twice"),
        ("a.jsonl", b"", "has no rows"),
    ],
)
def test_what_is_no_source_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_pairs("auto", str(tmp_path / name))


def test_folders_that_are_no_source_are_described(tmp_path: Path) -> None:
    write_images(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"has 6 images, and no file that pairs them \(nor folders such as good/"):
        check_source("auto", str(tmp_path / "alone"))
    (tmp_path / "a.csv").write_bytes(as_csv(records(uri)))
    (tmp_path / "b.jsonl").write_bytes(as_lines(records(uri)))
    with pytest.raises(ValueError, match=r"has files of several kinds \(a.csv, b.jsonl\); name one"):
        check_source("auto", str(tmp_path))


def test_sides_drop_what_has_no_partner_or_caption(tmp_path: Path) -> None:
    folder = sides(tmp_path / "data")
    (folder / "Good" / "lonely.png").write_bytes(data_files.png(0))
    for side in ("Good", "bad"):
        (folder / side / "blank.png").write_bytes(data_files.png(1))
        (folder / side / "long.png").write_bytes(data_files.png(1))
        (folder / side / "pipe.png").write_bytes(data_files.png(1))
    (folder / "bad" / "blank.txt").write_text(" \n")
    (folder / "Good" / "long.txt").write_text("x" * 2**17)
    os.mkfifo(folder / "Good" / "pipe.txt")
    pairs = open_pairs("auto", str(folder))
    assert seeds(pairs) == ROWS
    reasons = {row.location: row.reason for row in pairs.skipped}
    assert set(reasons) == {f"data: {name}" for name in ("lonely", "blank", "long", "pipe")}
    assert "no image in bad/" in reasons["data: lonely"] and "has no caption" in reasons["data: blank"]
    assert "more than 65,536" in reasons["data: long"] and "not a regular file" in reasons["data: pipe"]


def test_members_of_archives_are_regular_and_of_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(data_files.png(5))
    path = webdataset(tmp_path)
    with tarfile.open(path, "a") as archive:
        for key, changes in (
            ("link", {"type": tarfile.SYMTYPE, "linkname": "secret.png"}),
            ("pipe", {"type": tarfile.FIFOTYPE}),
        ):
            add(archive, f"{key}.chosen.png", b"", **changes)
            add(archive, f"{key}.rejected.png", data_files.png(1))
            add(archive, f"{key}.txt", b"a")
        add(
            archive, "out.json", json.dumps({"prompt": "a", "chosen": "../x.png", "rejected": "/etc/hostname"}).encode()
        )
    pairs = open_pairs("auto", str(path))
    assert seeds(pairs) == ROWS
    assert ["not a regular file" in row.reason for row in pairs.skipped] == [True, True, False]
    assert "is outside" in pairs.skipped[2].reason


HOSTILE = [
    "../secret.png",
    "/etc/hostname",
    "file:///etc/hostname",
    "..\\secret.png",
    "a" * 5000,
    "a\0b",
    "pipe.png",
    "",
]
HOSTILE += ["https://example.com/a.png", "s3://bucket/a.png", "data:image/png;base64,####", "data:image/png,raw"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("modality", ["image", "response"])
def test_a_hostile_row_is_dropped_and_named(kind: str, modality: str, tmp_path: Path) -> None:
    """It ends no run, no file outside the folder is read, and no message is long."""
    folder = tmp_path / "rows"
    write_images(folder)
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "secret.png").write_bytes(data_files.png(5))
    hostile = [value for value in HOSTILE if kind != "csv" or "\0" not in value]
    rows: list[dict[str, Any]] = [{"prompt": "a", "chosen": path_of(0), "rejected": value} for value in hostile]
    rows += records(path_of)
    if modality == "response":
        rows = [{"image": row["rejected"], "prompt": "a", "chosen": "b", "rejected": "c"} for row in rows]
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(as_csv(rows) if kind == "csv" else as_lines(rows))
    pairs: Pairs[Any] = open_pairs("auto", str(path)) if modality == "image" else open_responses("trl", str(path))
    assert len(pairs) == 3 and len(pairs.skipped) == len(hostile)
    assert all(len(str(row)) < 400 for row in pairs.skipped)
    reasons = [row.reason for row in pairs.skipped]
    assert all("is outside" in reason for reason in reasons[:3])
    assert sum("is a URL" in reason for reason in reasons) == 2
    assert sum("data URI" in reason for reason in reasons) == 2
    assert any("not a regular file" in reason for reason in reasons)
