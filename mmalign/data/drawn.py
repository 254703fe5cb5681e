"""Pairs that a model drew itself: the best against the worst image of each prompt, in the layout of Pick-a-Pic v2."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_pairs(
    path: Path,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    scores: Sequence[float],
    *,
    group: int,
    sure: float,
) -> tuple[int, int]:
    """Write a parquet file of pairs; left and right are in the order drawn, so position says nothing.

    Args:
        path: the file; written whole or not at all.
        prompts: [N], each `group` times in a row.
        images: [N].
        scores: the judge's [N]; higher is better, in units whose difference is a log-odds.
        group: images of one prompt.
        sure: the least preference probability `1 / (1 + exp(worst - best))` of a pair that is kept.

    Returns:
        How many pairs were kept, and of how many prompts.

    Raises:
        ValueError: no pair is kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for start in range(0, len(prompts), group):
        numbers = range(start, start + group)
        best, worst = max(numbers, key=lambda i: scores[i]), min(numbers, key=lambda i: scores[i])
        gap = scores[best] - scores[worst]
        if 1 / (1 + math.exp(-gap)) < sure:
            continue
        left, right = sorted((best, worst))
        png = [_png(images[left]), _png(images[right])]
        rows.append(
            {
                "caption": prompts[start],
                "jpg_0": png[0],
                "jpg_1": png[1],
                "label_0": float(left == best),
                "label_1": float(right == best),
                "image_0_uid": hashlib.sha256(png[0]).hexdigest()[:24],
                "image_1_uid": hashlib.sha256(png[1]).hexdigest()[:24],
                "score_0": scores[left],
                "score_1": scores[right],
            }
        )
    asked = len(prompts) // group
    if not rows:
        raise ValueError(
            f"prepare: the judge is never {sure:.0%} sure in {asked} prompts; "
            "lower prepare.sure, or draw more images a prompt"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows), part, compression="zstd")
    part.replace(path)
    return len(rows), asked


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
