"""Three pairs of images as files of every kind."""

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

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
