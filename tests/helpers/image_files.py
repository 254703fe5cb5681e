"""Files of image pairs, and the levels of their images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmalign.data.images import decode
from mmalign.data.pairs import Pairs


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def level(pairs: Pairs, number: int) -> tuple[int, int]:
    """The red of the chosen and of the rejected image."""
    pair = pairs[number]
    red = [int(np.asarray(decode(side))[0, 0, 0]) for side in (pair.chosen, pair.rejected)]
    return red[0], red[1]


def write(path: Path, labels: list[tuple[Any, Any]], **extra: Any) -> Path:
    """Row i shows levels 10 i and 10 i + 1."""
    table = {
        "caption": [f"prompt {i}" for i in range(len(labels))],
        "jpg_0": [png(10 * i) for i in range(len(labels))],
        "jpg_1": [png(10 * i + 1) for i in range(len(labels))],
        "label_0": [a for a, _ in labels],
        "label_1": [b for _, b in labels],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in (table | extra).items() if v is not None}), path)
    return path


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def pictures(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(png(i))
