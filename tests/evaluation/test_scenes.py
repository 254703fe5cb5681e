"""Scores of scenes: pictures drawn right and drawn wrong, counted by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from mmalign.data.scenes import draw, lay_out, parse
from mmalign.evaluation.intervals import paired_difference, proportion
from mmalign.evaluation.scenes import Accuracy, compare_scenes, describe, report_scenes, score_scenes

PROMPTS = [
    "a red circle",
    "a small blue star",
    "two green hearts",
    "three red squares",
    "a red circle and a blue square",
    "a yellow cross left of a purple triangle",
]
WRONG = [
    "an orange circle",  # colour
    "a large blue star",  # size
    "three green hearts",  # count, and so the lists of colours and shapes
    "three red squares",  # right
    "a blue circle and a red square",  # colours and shapes swapped: only "correct" is wrong
    "a purple triangle left of a yellow cross",  # relation
]


def pictures(captions: list[str]) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [draw(lay_out(parse(caption), rng)) for caption in captions]


def test_scores_what_was_drawn() -> None:
    assert all(truth["correct"] for truth in score_scenes(pictures(PROMPTS), PROMPTS))
    notes = [describe(truth) for truth in score_scenes(pictures(WRONG), PROMPTS)]
    assert notes == [  # what only follows from another fault is not named
        "colour wrong",
        "size wrong",
        "count wrong",
        "correct",
        "colours and shapes swapped",
        "relation wrong",
    ]


def test_report_by_hand() -> None:
    report = report_scenes(score_scenes(pictures(WRONG), PROMPTS), PROMPTS)
    assert report.overall == Accuracy(1, 6)
    assert report.overall.interval == proportion(1, 6)
    assert report.by_category == {
        "single": Accuracy(0, 2),
        "count": Accuracy(1, 2),
        "two": Accuracy(0, 1),
        "relation": Accuracy(0, 1),
    }
    assert report.by_attribute == {
        "count": Accuracy(5, 6),
        "colour": Accuracy(4, 6),
        "shape": Accuracy(5, 6),
        "size": Accuracy(0, 1),  # over the one prompt that names a size
        "relation": Accuracy(0, 1),
    }


def test_comparison_by_hand() -> None:
    before, after = score_scenes(pictures(WRONG), PROMPTS), score_scenes(pictures(PROMPTS), PROMPTS)
    found = compare_scenes(before, after, PROMPTS)
    assert found.difference == paired_difference([0, 0, 0, 1, 0, 0], [1] * 6)
    assert found.difference_by_category["count"] == paired_difference([0, 1], [1, 1])
    assert found.difference_by_attribute["colour"] == paired_difference([0, 1, 0, 1, 1, 1], [1] * 6)
    assert "size" not in found.difference_by_attribute
    backwards = compare_scenes(after, before, PROMPTS)
    assert backwards.difference.low == pytest.approx(-found.difference.high)


def test_seeds_of_a_prompt_are_one_group() -> None:
    """Three copies of the same evidence leave the interval as it was."""
    before, after = score_scenes(pictures(WRONG), PROMPTS), score_scenes(pictures(PROMPTS), PROMPTS)
    once, thrice = (compare_scenes(before * k, after * k, PROMPTS * k).difference for k in (1, 3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_table_and_dict() -> None:
    before, after = score_scenes(pictures(WRONG), PROMPTS), score_scenes(pictures(PROMPTS), PROMPTS)
    found = compare_scenes(before, after, PROMPTS)
    header, overall, *rest = found.table()
    assert {len(row) for row in (header, overall, *rest)} == {5}
    assert overall[:2] == ("all", "6")
    assert overall[2].startswith("16.7 [") and overall[3].startswith("100.0 [") and overall[4].startswith("+83.3 [")
    assert [row[0] for row in rest[:2]] == ["category: single", "category: count"]
    assert next(row for row in rest if row[0] == "attribute: size")[4] == "one prompt only"
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert record["overall"]["difference"]["estimate"] == pytest.approx(5 / 6)
    assert record["by_attribute"]["size"] == {
        "number": 1,
        "before": proportion(0, 1).as_dict(),
        "after": proportion(1, 1).as_dict(),
        "difference": None,
    }


def test_refuses() -> None:
    white = Image.new("RGB", (64, 64), "white")
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        score_scenes([white], ["a red circle"] * 2)
    with pytest.raises(ValueError, match="cannot read 'a photo of a dog'"):
        score_scenes([white], ["a photo of a dog"])
    with pytest.raises(ValueError, match="no image to measure"):
        report_scenes([], [])
    truths = score_scenes([white], ["a red circle"])
    with pytest.raises(ValueError, match="measure more prompts"):
        compare_scenes(truths, truths, ["a red circle"])
    with pytest.raises(ValueError, match="1 truths for 2 prompts"):
        compare_scenes(truths * 2, truths, ["a red circle"] * 2)
