"""Parquet files of questions: their rows, their images by name, and files that are refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.images import BadImage
from mmalign.evaluation.question_files import EmbeddedImages, read_rows
from tests.helpers import data_files

PNG = [data_files.png(n, 16 + n) for n in range(3)]


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=2)
    return file


def opened(path: Path) -> tuple[list[Any], EmbeddedImages]:
    rows, images = read_rows(path)
    assert images is not None
    return [record for _, record in rows], images


def test_rows_of_a_folder_and_their_images(tmp_path: Path) -> None:
    for n in range(2):
        rows = [{"question": f"q{n}{i}", "image": {"bytes": PNG[i], "path": f"{i}.png"}} for i in range(3)]
        write(tmp_path / "data" / f"test-{n}.parquet", *rows)
    records, images = opened(tmp_path / "data")
    assert [(r["question"], r["image"]) for r in records] == [
        (f"q{n}{i}", f"{i}.png") for n in range(2) for i in range(3)
    ]
    assert [images(f"{i}.png").width for i in (2, 0, 1)] == [18, 16, 17]
    assert opened(tmp_path / "data" / "*.parquet")[0] == records


def test_images_as_bytes_without_a_name(tmp_path: Path) -> None:
    records, images = opened(write(tmp_path / "q.parquet", *({"image": PNG[i]} for i in range(3))))
    assert [r["image"] for r in records] == ["q-0", "q-1", "q-2"] == list(images)
    assert images("q-2").width == 18


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"question": "?"}], "has \\[\"question\"\\]; expected a column 'image'"),
        ([{"image": "0.png"}], "row 0: image is .* expected encoded bytes"),
        ([{"image": {"bytes": None, "path": "0.png"}}], "row 0: image is .* expected encoded bytes"),
        ([{"image": {"bytes": PNG[i], "path": "a.png"}} for i in range(2)], "row 1: another image is called a.png"),
    ],
)
def test_tables_that_are_refused(rows: list[dict[str, Any]], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        read_rows(write(tmp_path / "q.parquet", *rows))


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        read_rows(tmp_path / "q.parquet")
    with pytest.raises(ValueError, match="matches no file"):
        read_rows(tmp_path / "none*.parquet")
    _, images = opened(write(tmp_path / "bad.parquet", {"image": b"no image"}))
    with pytest.raises(BadImage, match=r"bad\.parquet: row 0, bad-0: is not a readable image"):
        images("bad-0")
