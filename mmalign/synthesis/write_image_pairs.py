"""Writer of generated image pairs, in the layout of Pick-a-Pic v2.

A pair is the best and the worst image of one prompt, or the best images of two contrasting prompts. Lists have all
images of a prompt, with their scores.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmalign.synthesis.confidence import is_sure
from mmalign.synthesis.unfinished import write_final
from mmalign.synthesis.write_responses import write_parquet


def write_pairs(
    path: Path,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    scores: Sequence[float],
    *,
    group: int,
    min_confidence: float,
    sources: Sequence[bytes] | None = None,
    keep_all: bool = False,
) -> tuple[int, int]:
    """Write a parquet file of pairs, or of lists in the layout of rankings if `keep_all`.

    Images follow the order of generation, so position says nothing.

    Args:
        path: the file; written whole or not at all.
        prompts: [N], each `group` times in a row.
        images: [N].
        scores: the reward model's scores [N]; higher is better, in units whose difference is a log-odds.
        group: the number of images per prompt.
        min_confidence: the least preference probability `1 / (1 + exp(worst - best))` of a prompt's best image.
        sources: the images [N] that these are edits of, encoded; None for images from prompts alone.
        keep_all: keep all images of a prompt, not only the best and the worst.

    Returns:
        The number of rows written, and the number of prompts.

    Raises:
        ValueError: no prompt has a confident enough preference.
    """
    rows, num_prompts = [], len(prompts) // group
    for start in range(0, len(prompts), group):
        # The images of one prompt, of which the reward model has to be sure
        numbers = range(start, start + group)
        best, worst = max(numbers, key=lambda i: scores[i]), min(numbers, key=lambda i: scores[i])
        if not is_sure([scores[i] for i in numbers], min_confidence):
            continue
        if keep_all:
            row = {"prompt": prompts[start], **_ranking([images[i] for i in numbers], [scores[i] for i in numbers])}
        else:
            # Left and right as generated, with the label 1 at the best
            left, right = sorted((best, worst))
            labels, judged = (float(left == best), float(right == best)), (scores[left], scores[right])
            row = {"caption": prompts[start], **_sides((images[left], images[right]), labels, judged)}
        rows.append({**row, "source": sources[start]} if sources is not None else row)
    _write(path, rows, f"the reward model is never {min_confidence:.0%} sure in {num_prompts} prompts")
    return len(rows), num_prompts


def _ranking(images: Sequence[Image.Image], scores: Sequence[float]) -> dict[str, object]:
    """Return the columns of all images of a row."""
    return {"image_path": [_png(image) for image in images], "human_preference": list(scores)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def best_of_each(scores: Sequence[float], group: int) -> list[int]:
    """Return the index of the best score in each consecutive group."""
    starts = range(0, len(scores), group)
    return [max(range(start, start + group), key=lambda i: scores[i]) for start in starts]


def write_prompt_pairs(
    path: Path,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    own: Sequence[float],
    crossed: Sequence[float],
    *,
    min_confidence: float,
) -> tuple[int, int]:
    """Write a parquet file of pairs with two prompts: `caption` is the chosen image's, `rejected_caption` the other's.

    Args:
        path: the file; written whole or not at all.
        prompts: [2N], the first and the second of a couple in turn.
        images: the best image of each prompt [2N].
        own: the reward model's scores of the images by their own prompts [2N], in units whose difference is a log-odds.
        crossed: their scores by the couple's other prompt [2N].
        min_confidence: the least probability, by either prompt, that its own image is preferred to the other prompt's.

    Returns:
        The number of couples written, and the number of couples.

    Raises:
        ValueError: no couple is confident enough.
    """
    rows, num_couples = [], len(prompts) // 2
    for a, b in zip(range(0, len(prompts), 2), range(1, len(prompts), 2), strict=True):
        # Each image has to suit its own prompt better than the couple's other image does
        judged = (own[a], crossed[b]), (own[b], crossed[a])
        if all(suiting > other and is_sure((suiting, other), min_confidence) for suiting, other in judged):
            sides = _sides((images[a], images[b]), (1.0, 0.0), (own[a], own[b]))
            rows.append({"caption": prompts[a], "rejected_caption": prompts[b], **sides})
    unsure = f"the reward model is never {min_confidence:.0%} sure of both images in {num_couples} prompt pairs"
    _write(path, rows, unsure)
    return len(rows), num_couples


def _sides(
    images: tuple[Image.Image, Image.Image], labels: tuple[float, float], scores: tuple[float, float]
) -> dict[str, object]:
    """Return the columns of both images of a row."""
    columns = dict[str, object]()
    for side, (image, label, score) in enumerate(zip(images, labels, scores, strict=True)):
        png = _png(image)
        columns |= {f"jpg_{side}": png, f"label_{side}": label, f"score_{side}": score}
        columns[f"image_{side}_uid"] = hashlib.sha256(png).hexdigest()[:24]
    return columns


def _write(path: Path, rows: Sequence[dict[str, object]], unsure: str) -> None:
    """Write the rows; raise ValueError with the reason `unsure` if there is none."""
    if not rows:
        raise ValueError(f"prepare: {unsure}; lower prepare.min_confidence, or generate more images per prompt")
    write_final(path, lambda part: write_parquet(part, rows))
