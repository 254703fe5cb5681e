"""Parquet files, with columns of any type and images in cells, in the layouts of both modalities."""

import io
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from mmalign.data.formats import images, responses
from mmalign.data.images import BadImage, decode
from tests.fuzzing.readers.rows import RESPONSE_ROWS, use
from tests.fuzzing.rule import Files, Reader
from tests.helpers.data_files import png

Columns = dict[str, Any]  # an array of pyarrow, or a list, by name
NUMBER = 2  # rows
PICK = {
    "caption": ["a fox", "a cat"],
    "jpg_0": [png(0), png(1)],
    "jpg_1": [png(2), png(3)],
    "label_0": [1.0, 0.0],
    "label_1": [0.0, 1.0],
    "image_0_uid": ["a", "b"],
    "image_1_uid": ["c", "d"],
    "are_different": [True, True],
    "has_label": [True, None],
    "rejected_caption": ["a hen", None],
}
RESPONSE_TABLES = {
    "trl": [{**RESPONSE_ROWS["trl"][0], "images": [{"bytes": png(0), "path": None}]}] * NUMBER,
    "realign": [{**RESPONSE_ROWS["realign"][0], "image": png(0), "retrieved_image": png(1)}] * NUMBER,
    "answers": [{**RESPONSE_ROWS["answers"][0], "images": [png(0)]}] * NUMBER,
}


@cache
def arrays() -> list[Any]:
    """Return columns of all kinds of types."""
    raw, structs = [png(0), None], [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "../y.png"}]
    lists: list[Any] = [
        *([1, None], [True, False], [1.5, float("nan")], ["", "x"], [None, None], [b"", b"\xff"], [[], [None]], raw),
        *(structs, [structs, []], [[png(0)], [None, b""]], [[[png(0)]], None], [{"bytes": "x"}, None], [{"a": 1}] * 2),
        *(
            [{"bytes": png(0), "path": 3}] * 2,
            [[{"bytes": "x", "path": "y"}], []],
            [["a"], ["b"]],
            [[{"role": "user"}]] * 2,
        ),
    ]
    made: list[Any] = [pa.array(values) for values in lists]
    made += [pa.array(raw, pa.large_binary()), pa.array(["a", "a"]).dictionary_encode(), pa.array([1, 2], pa.uint8())]
    made += [pa.array([[png(0)], []], pa.large_list(pa.binary())), pa.array([b"abcd", None], pa.binary(4))]
    made += [
        pa.array([1, 2], pa.timestamp("us")),
        pa.array([1, 2], pa.decimal128(5, 1)),
        pa.array(["a", None], pa.large_string()),
    ]
    return [*made, pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), pa.array([1, 2], pa.float16())]


def in_parquet(columns: Columns, metadata: dict[bytes, bytes] | None = None) -> Files:
    table = pa.table(columns).replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return {"rows.parquet": buffer.getvalue()}


@st.composite
def tables(draw: st.DrawFn, sound: Columns) -> Files:
    """Give some columns other types or names."""
    columns = dict(sound)
    for name in draw(st.lists(st.sampled_from(sorted(sound)), max_size=3)):
        columns[name] = arrays()[draw(st.integers(0, len(arrays()) - 1))]
    if draw(st.booleans()):
        columns[draw(st.sampled_from(["", "extra", "caption "]))] = columns.pop(draw(st.sampled_from(sorted(columns))))
    metadata = [
        None,
        {b"huggingface": b"{"},
        {b"huggingface": b'{"info": {"features": {"jpg_0": {"_type": "Audio"}}}}'},
    ]
    return in_parquet(columns, draw(st.sampled_from([None, None, *metadata])))


def read(folder: Path, layout: str) -> None:
    path = str(folder / "rows.parquet")
    if layout == "pick_a_pic":
        images.check_source(layout, path)
        pairs: Any = images.open_pairs(layout, path)
        refs = [ref for pair in pairs for ref in (pair.chosen, pair.rejected)]
    else:
        pairs = responses.open_responses(layout, path)
        refs = [ref for pair in pairs for ref in pair.images]
    use(pairs)
    for ref in refs:
        try:
            decode(ref)
        except BadImage as error:
            assert ref.location in str(error)


def reader(layout: str, columns: Columns) -> Reader:
    files = in_parquet(columns)
    known = partial(read, layout=layout)
    return Reader(f"tables: {layout}", known, (files,), share=5, places=("data.path",), generated=tables(columns))


RESPONSE_COLUMNS = {
    layout: {name: [row[name] for row in rows] for name in rows[0]} for layout, rows in RESPONSE_TABLES.items()
}
READERS = tuple(reader(layout, columns) for layout, columns in {"pick_a_pic": PICK, **RESPONSE_COLUMNS}.items())
