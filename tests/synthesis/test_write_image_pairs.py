"""Which drawn images become pairs, and what is written of them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.data.formats.images import open_pairs
from mmalign.synthesis.write_image_pairs import best_of_each, write_pairs, write_prompt_pairs
from mmalign.toy import scenes


def images(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(number)]


def test_pairs_best_and_worst_above_min_confidence(tmp_path: Path) -> None:
    """sigma(2) = 0.88: surer than 0.8 in the first three images, and in the others, a nat apart, 0.73."""
    scores = [1.0, 0.0, 2.0, 5.0, 4.0, 4.5]
    prompts = ["a"] * 3 + ["b"] * 3
    assert write_pairs(tmp_path / "p.parquet", prompts, images(6), scores, group=3, min_confidence=0.8) == (1, 2)
    (row,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (row["caption"], row["label_0"], row["label_1"], row["score_0"], row["score_1"]) == ("a", 0.0, 1.0, 0.0, 2.0)
    with pytest.raises(ValueError, match=r"never 95% sure in 2 prompts; lower prepare\.min_confidence, or"):
        write_pairs(tmp_path / "q.parquet", prompts, images(6), scores, group=3, min_confidence=0.95)
    assert not (tmp_path / "q.parquet").exists()


def test_the_best_of_each_prompt() -> None:
    assert best_of_each([1.0, 3.0, 2.0, 0.0, -1.0, -2.0], 3) == [1, 3]


def test_contrast_needs_one_prompt_that_prefers_its_image(tmp_path: Path) -> None:
    """Four couples, own scores 2. By the other prompt 0 and 0: kept. 1.9 on either side alone: 0.52 sure, dropped.

    The score of the second image by the first prompt is to be compared with that of the first image by it.
    """
    path = tmp_path / "p.parquet"
    prompts = ["a", "b", "c", "d", "e", "f", "g", "h"]
    own = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 9.0, 1.0]
    crossed = [0.0, 0.0, 1.9, 0.0, 0.0, 1.9, 0.0, 8.0]  # the last: 9 to 8 by g, 1 to 0 by h, 0.73 each
    assert write_prompt_pairs(path, prompts, images(8), own, crossed, min_confidence=0.8) == (1, 4)
    assert write_prompt_pairs(path, prompts, images(8), own, crossed, min_confidence=0.7) == (2, 4)
    first, second = open_pairs("pick_a_pic", str(path), prompt_pairs="x needs two")
    assert (first.prompt, first.rejected_prompt, second.prompt, second.rejected_prompt) == ("a", "b", "g", "h")
    rows = pq.read_table(path).to_pylist()
    assert [(r["label_0"], r["label_1"], r["score_0"], r["score_1"]) for r in rows] == [(1, 0, 2, 2), (1, 0, 9, 1)]
    with pytest.raises(ValueError, match=r"never 99% sure of both images in 4 prompt pairs; lower"):
        write_prompt_pairs(path, prompts, images(8), own, crossed, min_confidence=0.99)


def test_bundled_contrasts_differ_in_one_attribute() -> None:
    couples = scenes.sample_prompt_pairs(400, seed=0)
    known = set(scenes.all_prompts())
    assert couples == scenes.sample_prompt_pairs(400, seed=0) != scenes.sample_prompt_pairs(400, seed=1)
    assert [first for first, _ in couples] == scenes.sample_prompts("train", 400, 0)
    changed = set()
    for first, second in couples:
        assert first != second and second in known and scenes.split_of(second) == "train"
        assert first.category == second.category and first.relation == second.relation
        first_groups, second_groups = (
            [(g.number, g.colour, g.shape, g.size) for g in prompt.groups] for prompt in (first, second)
        )
        different = [
            name
            for a, b in zip(first_groups, second_groups, strict=True)
            for name, x, y in zip(("count", "colour", "shape", "size"), a, b, strict=True)
            if x != y
        ]
        swapped = first.relation is not None and first_groups == second_groups[::-1]
        assert swapped or len(different) == 1, (str(first), str(second))
        changed.add("relation" if swapped else different[0])
    assert changed == set(scenes.ATTRIBUTES)


def test_prompts_that_prefer_neither_image_make_no_pair(tmp_path: Path) -> None:
    """Equal scores have a probability of 1/2, and teach nothing."""
    own, crossed = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.5]
    path = tmp_path / "p.parquet"
    assert write_prompt_pairs(path, ["a", "b", "c", "d"], images(4), own, crossed, min_confidence=0.5) == (1, 2)
