"""Data of the studies: judged images of the bundled model, as wrong labels, pairs and pairs with two judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmalign.evaluation.benchmarks.scenes import check_scenes
from mmalign.rng import KeyedRNG

Row = dict[str, Any]


def chance(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return scores between 0 and 1 that tell nothing: hashes of the images' pixels and their prompts."""
    digests = [
        blake2b(image.tobytes() + prompt.encode(), digest_size=6).digest()
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return [int.from_bytes(digest) / 2**48 for digest in digests]


def flip_labels(source: Path, target: Path, share: float, seed: int = 0) -> int:
    """Write a Pick-a-Pic file with a random share of its labels swapped, and return their number."""
    table = pq.read_table(source)
    keys = KeyedRNG(seed).uniform(list(range(table.num_rows)), (1,), "studies: flipped label")[:, 0]
    flipped = (keys < share).tolist()
    names = table.column_names
    for kind in ("label", "score"):
        sides = [table.column(f"{kind}_{side}").to_pylist() for side in (0, 1)]
        rows = [(b, a) if flip else (a, b) for a, b, flip in zip(*sides, flipped, strict=True)]
        for side, name in enumerate((f"{kind}_0", f"{kind}_1")):
            column = pa.array([row[side] for row in rows], table.schema.field(name).type)
            table = table.set_column(names.index(name), name, column)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return sum(flipped)


def write_best_and_worst(lists: Path, target: Path) -> int:
    """Write the best and the worst image of every list as a Pick-a-Pic file, and return the number of pairs."""
    rows = list[Row]()
    for prompt, images, scores in _lists(lists):
        order = sorted(range(len(images)), key=lambda number: scores[number])
        left, right = sorted((order[0], order[-1]))
        sides = ((images[n], float(n == order[-1]), scores[n]) for n in (left, right))
        rows.append(_row(prompt, *sides))
    _write(target, rows)
    return len(rows)


def write_objectives(lists: Path, target: Path, labels: str, margin: str, worth: float) -> int:
    """Write the pairs that one part of the prompts decides, with scores by another, and return their number.

    Args:
        lists: generated images, several for each prompt.
        target: a Pick-a-Pic file.
        labels: the part, such as "count", that exactly one image of a pair fulfils: the chosen one.
        margin: the part whose fulfilment is the score.
        worth: the score of a fulfilled part, in log-odds.
    """
    rows = list[Row]()
    for prompt, images, _ in _lists(lists):
        truths = check_scenes([Image.open(BytesIO(image)) for image in images], [prompt] * len(images))
        sides = [
            (image, float(truth[labels]), worth * truth[margin]) for image, truth in zip(images, truths, strict=True)
        ]
        rows += [_row(prompt, *pair) for pair in combinations(sides, 2) if pair[0][1] != pair[1][1]]
    _write(target, rows)
    return len(rows)


def _lists(path: Path) -> Iterator[tuple[str, list[bytes], list[float]]]:
    for row in pq.read_table(path).to_pylist():
        yield row["prompt"], row["image_path"], row["human_preference"]


def _row(prompt: str, *sides: tuple[bytes, float, float]) -> Row:
    row: Row = {"caption": prompt}
    for number, (image, label, score) in enumerate(sides):
        row |= {f"jpg_{number}": image, f"label_{number}": label, f"score_{number}": score}
    return row


def _write(target: Path, rows: list[Row]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), target)
