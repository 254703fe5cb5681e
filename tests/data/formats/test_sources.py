"""Files of every kind give the same pairs; what is no row is dropped, and what is no source is refused."""

import base64
import csv
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features
from datasets.exceptions import DatasetGenerationError

from mmalign.data.formats.image_files import StoredImage
from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.formats.responses import open_responses
from mmalign.data.formats.rows import SourceRow
from mmalign.data.formats.tables import TableRows
from mmalign.data.images import decode
from mmalign.data.pairs import Pairs
from tests.helpers import data_files

PROMPTS = ["a fox, red", "ein Bär", "1984"]
ROWS = [(prompt, 2 * n, 2 * n + 1) for n, prompt in enumerate(PROMPTS)]  # prompt, and the seeds of both images


def seeds(pairs: Pairs) -> list[tuple[str, int, int]]:
    """Return every pair's prompt and the seeds of its images."""
    known = {decode_bytes(data_files.png(seed)): seed for seed in range(6)}
    return [
        (p.prompt, *(known[np.asarray(decode(image)).tobytes()] for image in (p.chosen, p.rejected))) for p in pairs
    ]


def decode_bytes(data: bytes) -> bytes:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for seed in range(6):
        (folder / "images" / f"{seed}.png").write_bytes(data_files.png(seed))


def records(image: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{"prompt": p, "chosen": image(a), "rejected": image(b)} for p, a, b in ROWS]


def path_of(seed: int) -> str:
    return f"images/{seed}.png"


def uri(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(data_files.png(seed)).decode()


def as_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def write_text(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_images(folder)
        (folder / name).write_bytes(gzip.compress(content()) if name.endswith(".gz") else content())
        return folder / name

    return write


def parquet(image: Callable[[int], Any], kind: pa.DataType | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_images(folder)
        schema = None if kind is None else pa.schema([("prompt", pa.string()), ("chosen", kind), ("rejected", kind)])
        pq.write_table(pa.Table.from_pylist(records(image), schema), folder / "pairs.parquet")
        return folder / "pairs.parquet"

    return write


def save_to_disk(folder: Path) -> Path:
    Dataset.from_list(records(data_files.png)).save_to_disk(folder / "saved")
    return folder / "saved"


def sides(folder: Path) -> Path:
    for n, (prompt, *both) in enumerate(ROWS):
        for side, seed in zip(("Good", "bad"), both, strict=True):
            (folder / side).mkdir(parents=True, exist_ok=True)
            (folder / side / f"{n}.{'png' if n else 'PNG'}").write_bytes(data_files.png(seed))
        (folder / "Good" / f"{n}.txt").write_text(f"\ufeff{prompt}\n", encoding="utf-8")
    return folder


def sides_with_metadata(folder: Path) -> Path:
    sides(folder)
    for file in folder.glob("Good/*.txt"):
        file.unlink()
    rows = [{"file_name": f"Good/{n}.png", "text": prompt} for n, prompt in enumerate(PROMPTS)]
    (folder / "metadata.csv").write_bytes(as_csv(rows))
    return folder


def image_folder(folder: Path) -> Path:
    write_images(folder / "train")
    (folder / "train" / "metadata.jsonl").write_bytes(as_lines(records(path_of)))
    return folder


def add(archive: tarfile.TarFile, name: str, data: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def webdataset(folder: Path, chosen: str = "chosen.png", rejected: str = "rejected.png") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for n, (prompt, first, second) in enumerate(ROWS):
            add(archive, f"./{n:03}.{chosen}", data_files.png(first))
            add(archive, f"./{n:03}.{rejected}", data_files.png(second))
            add(archive, f"./{n:03}.txt", prompt.encode())
    return folder / "shard-000.tar"


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
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


def test_paths_are_under_a_named_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere")
    (tmp_path / "rows").mkdir()
    for name, content in (("a.jsonl", as_lines(records(path_of))), ("a.csv", as_csv(records(path_of)))):
        (tmp_path / "rows" / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"does not exist.*; data\.images names the folder of the images"):
            open_pairs("auto", str(tmp_path / "rows" / name))
        assert seeds(open_pairs("auto", str(tmp_path / "rows" / name), images=tmp_path / "elsewhere")) == ROWS
    with pytest.raises(ValueError, match=r"data\.images: .*nowhere is not a folder"):
        check_source("auto", str(tmp_path / "rows" / "a.csv"), images=str(tmp_path / "nowhere"))


def test_images_of_one_stem_have_captions_of_their_own(tmp_path: Path) -> None:
    for name, seed in (("good/1.png", 0), ("good/1.jpg", 1), ("bad/2.png", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data_files.png(seed))
    named = [("", "nothing"), (".", "nothing"), ("good/1.png", "p"), ("good/1.jpg", "j"), ("bad/2", "b")]
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in named]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    thumbs = open_pairs("auto", str(tmp_path), learning="thumbs")
    assert {(Path(thumb.outputs[0].path).name, thumb.prompt) for thumb in thumbs} == {
        ("1.png", "p"),
        ("1.jpg", "j"),
        ("2.png", "b"),
    }


def test_many_bad_rows_at_the_start_end_no_run(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"oops\n" * 120 + as_lines(records(path_of)))
    pairs = open_pairs("auto", str(path))
    assert len(pairs) == len(ROWS) and len(pairs.skipped) == 120


def test_an_open_quotation_mark_names_all_lines_that_it_takes(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = as_csv(records(path_of)).decode().splitlines()
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([*lines[:2], '"open,images/0.png,images/1.png', *lines[2:]]))
    pairs = open_pairs("auto", str(path))
    (row,) = pairs.skipped
    assert row.location == "rows.csv: line 3" and "up to 5" in row.reason and len(pairs) == 1


@pytest.mark.parametrize("error", [RuntimeError("scripts are not supported"), DatasetGenerationError("x")])
def test_a_dataset_of_the_hub_that_cannot_be_loaded_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match=r"data.path: someone/something is not a local file"):
        open_pairs("auto", "someone/something")


def test_a_table_s_image_is_read_without_the_other_columns(tmp_path: Path) -> None:
    class Refusing(Features):
        def decode_example(self, *_: object, **__: object) -> None:
            raise AssertionError("another column is decoded")

    rows = [{"prompt": "a", "chosen": {"bytes": data_files.png(0)}, "rejected": {"bytes": data_files.png(1)}}]
    table = Dataset.from_list(rows)
    table.info.features = Refusing(table.features)
    chosen = next(iter(TableRows(table, [(0, "t")], None)))
    assert isinstance(chosen, SourceRow) and isinstance(chosen.record["chosen"], StoredImage)
    assert chosen.record["chosen"].read() == data_files.png(0)
