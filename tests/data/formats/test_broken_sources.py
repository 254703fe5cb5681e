"""Sources with broken starts, open quotation marks, twins and datasets that cannot be loaded."""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from mmalign.data.formats.image_files import StoredImage
from mmalign.data.formats.images import check_source, open_pairs
from mmalign.data.formats.rows import SourceRow
from mmalign.data.formats.tables import TableRows
from tests.helpers import data_files
from tests.helpers.sources import ROWS, as_csv, as_lines, path_of, records, seeds, write_images


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


def test_decimals_are_numbers(tmp_path: Path) -> None:
    """Databases write votes and ratings so."""
    decimal = pa.decimal128(10, 3)
    columns = {
        "caption": pa.array(["a fox, red", "ein Bär"]),
        **{f"jpg_{side}": pa.array([data_files.png(side), data_files.png(2 + side)]) for side in (0, 1)},
        "label_0": pa.array([Decimal("1.000"), Decimal("0.25")]).cast(decimal),
        "label_1": pa.array([Decimal("0.000"), Decimal("0.75")]).cast(decimal),
    }
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    pairs = open_pairs("auto", str(tmp_path / "pairs.parquet"))
    assert seeds(pairs) == [("a fox, red", 0, 1), ("ein Bär", 3, 2)]
    assert [pair.label.preference for pair in pairs] == [1.0, 0.75]
    lists = {
        "prompt": pa.array(["a fox, red"]),
        "image_path": pa.array([[data_files.png(0), data_files.png(1)]]),
        "human_preference": pa.array([[Decimal("1.5"), Decimal("2.5")]], pa.list_(decimal)),
    }
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    assert seeds(open_pairs("auto", str(tmp_path / "lists.parquet"))) == [("a fox, red", 1, 0)]
