"""Preference pairs on disk: images of noise, and rows in the layouts that mmalign reads."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 16  # pixels; the tiny autoencoder halves them
OBJECTS = ["red cube", "green ball", "dog", "cat", "blue mat", "car"]


def png(seed: int, side: int = SIDE, upper: bool = True) -> bytes:
    """Return a PNG of noise, white in its upper or in its lower half."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 64, (side, side, 3), dtype=np.uint8)
    pixels[slice(0, side // 2) if upper else slice(side // 2, side)] += 191
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pick_a_pic(
    path: Path,
    number: int = 8,
    bad: dict[int, bytes] | None = None,
    rejected: dict[int, str | None] | None = None,
    sources: bool = False,
) -> Path:
    """Write pairs in the layout of Pick-a-Pic v2, white upper halves preferred; `bad` replaces a pair's first image.

    `rejected` adds a column of second prompts: the given ones, or None, and a default for all other pairs. `sources`
    adds one of source images.
    """
    rows = []
    for i in range(number):
        first = i % 2 == 1  # whether the first image is the chosen one
        rows.append(
            {
                "caption": f"thing number {i}",
                "jpg_0": (bad or {}).get(i, png(2 * i, SIDE, first)),
                "jpg_1": png(2 * i + 1, SIDE + 4 * (i % 2), not first),
                "label_0": float(first),
                "label_1": float(not first),
                "image_0_uid": f"{path.name}-{i}-a",
                "image_1_uid": f"{path.name}-{i}-b",
            }
        )
        if rejected is not None:
            rows[-1]["rejected_caption"] = rejected.get(i, f"other number {i}")
        if sources:
            rows[-1]["source_image"] = png(100 + i, SIDE + 4 * (i % 3))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def response_pairs(folder: Path, number: int = 8, layout: str = "trl") -> Path:
    """Write rows of one of the layouts with their images; the rejected response names one object more."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(number):
        name = f"{n // 2}.png"  # two questions per image
        (folder / name).write_bytes(png(n // 2, 16 + 8 * (n % 3)))
        asked = "What is in this image?" if n % 2 else "Describe it."
        said = f"There is a {OBJECTS[n % 6]}."
        texts = {"chosen": said, "rejected": f"There is a {OBJECTS[n % 6]} and a {OBJECTS[(n + 1) % 6]}."}
        turns = {
            side: [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": text}]
            for side, text in texts.items()
        }
        layouts: dict[str, dict[str, Any]] = {
            "trl": {"images": [name], "prompt": asked, **texts},
            "rlhfv": {"image": name, "question": asked, **texts},
            "mdpo": {"img_path": name, "prompt": f"USER: <image>\n{asked} ASSISTANT:", **texts},
            "povid": {
                "image": name,
                "conversations": turns["chosen"],
                "rejected_conversations": turns["rejected"],
            },
            "realign": {"image": name, "retrieved_image": f"{(n // 2 + 1) % (number // 2)}.png", **turns},
        }
        rows.append(layouts[layout])
    path = folder / f"{layout}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path
