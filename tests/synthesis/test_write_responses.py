"""Files of generated response pairs."""

import base64
import json
from pathlib import Path

import pyarrow.parquet as pq

from mmalign.data.formats.responses import open_responses
from mmalign.synthesis.write_responses import GROUP, SynthesizedPair, write_pairs
from tests.helpers import data_files


def test_images_of_files_may_follow_images_without_one(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(data_files.png(0))
    uri = f"data:image/png;base64,{base64.b64encode(data_files.png(0)).decode()}"
    texts = {"prompt": "What is it?", "chosen": "A fox.", "rejected": "A dog."}
    rows = [json.dumps({**texts, "images": [image]}) for image in [uri] * GROUP + ["0.png"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    pairs = open_responses("trl", str(tmp_path / "rows.jsonl"))
    written = (SynthesizedPair(pair, "A cat.", "", None, {}) for pair in pairs)
    write_pairs(tmp_path / "pairs.parquet", written, suffix=".parquet", images=tmp_path)
    images = [row["images"][0] for row in pq.read_table(tmp_path / "pairs.parquet").to_pylist()]
    assert [image["path"] for image in images] == [""] * GROUP + ["0.png"]
    assert {image["bytes"] for image in images} == {data_files.png(0)}
