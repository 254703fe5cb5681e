"""Accuracy of scenes: pictures rendered correctly and drawn wrong, counted by hand."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation.benchmarks.scenes import OVERALL, check_scenes, compare_scenes, describe, measure_scenes
from mmalign.evaluation.metrics import Metrics
from mmalign.evaluation.statistics import paired_difference, proportion
from mmalign.toy.scenes import COLOURS, Truth, parse, place_objects, read, render

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


def check(captions: list[str], prompts: list[str] = PROMPTS) -> list[Truth]:
    rng = np.random.default_rng(5)
    return check_scenes([render(place_objects(parse(caption), rng)) for caption in captions], prompts)


def measure(truths: list[Truth], prompts: list[str] = PROMPTS) -> Metrics:
    return measure_scenes(truths, tuple(enumerate(prompts)), prompts)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    compared: dict[str, Any] = compare_scenes(measure(check(WRONG)), measure(check(PROMPTS)))[0]
    return compared


def test_scenes_are_checked_and_described() -> None:
    assert all(truth["correct"] for truth in check(PROMPTS))
    assert [describe(truth) for truth in check(WRONG)] == [  # no error that only follows from another one
        "colour wrong",
        "size wrong",
        "count wrong",
        "correct",
        "colours and shapes swapped",
        "relation wrong",
    ]


def test_touching_parts_are_one_object_if_nearer() -> None:
    def stained(caption: str, prompt: str) -> str:
        image = render(place_objects(parse(caption), np.random.default_rng(5)))
        left, top, right, bottom = image.convert("L").point(lambda value: 255 * (value < 200)).getbbox() or (0, 0, 0, 0)
        middle = (left + right) // 2
        image.paste(COLOURS["blue"], (middle - 2, top, middle + 3, (top + bottom) // 2 - 2))
        assert {thing.colour for thing in read(image)} == {"red", "blue"}  # read as two objects
        return describe(check_scenes([image], [prompt])[0])

    assert stained("a red cross", "a red heart") == "shape wrong"
    assert stained("a red cross", "a green cross") == "colour wrong"
    assert stained("a red cross", "a red cross") == "colour wrong"  # never correct
    assert stained("a red cross", "two red crosses") == "colour, shape wrong"  # the stain counts as an object


def test_scene_metrics_by_hand() -> None:
    metrics = measure(check(WRONG))
    attributes = {"count": 5 / 6, "colour": 4 / 6, "shape": 5 / 6, "size": 0, "relation": 0}
    categories = {"category single": 0, "category count": 1 / 2, "category two": 0, "category relation": 0}
    assert metrics.values == {OVERALL: 1 / 6, **attributes, **categories}
    assert metrics.headline_names == (OVERALL, *attributes)
    assert metrics.columns["size named"].sum() == 1  # a single prompt names a size
    assert set(measure([{"correct": True}], ["a red circle"]).values) == {OVERALL, "category single"}


def test_scene_comparison_by_hand(result: dict[str, Any]) -> None:
    def difference(before: list[int], after: list[int]) -> dict[str, float]:
        return paired_difference(before, after).as_dict()

    assert result["overall"] == {
        "number": 6,
        "before": proportion([1, 0, 0, 0, 0, 0]).as_dict(),
        "after": proportion([1] * 6).as_dict(),
        "difference": difference([0, 0, 0, 1, 0, 0], [1] * 6),
    }
    assert list(result["by_category"]) == ["single", "count", "two", "relation"]
    assert result["by_category"]["count"]["difference"] == difference([0, 1], [1, 1])
    assert list(result["by_attribute"]) == ["count", "colour", "shape", "size", "relation"]
    assert result["by_attribute"]["colour"]["difference"] == difference([0, 1, 0, 1, 1, 1], [1] * 6)
    assert result["by_attribute"]["size"] == {
        "number": 1,
        "before": proportion([0]).as_dict(),
        "after": proportion([1]).as_dict(),
        "difference": None,
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_scene_comparison_groups_seeds_of_a_prompt(result: dict[str, Any]) -> None:
    """Three copies of the same evidence leave the interval as it was."""
    before, after = (measure(check(captions) * 3, PROMPTS * 3) for captions in (WRONG, PROMPTS))
    thrice: Any = compare_scenes(before, after)[0]["overall"]
    assert thrice["difference"] == pytest.approx(result["overall"]["difference"])


def test_scene_table() -> None:
    header, overall, *rows = compare_scenes(measure(check(WRONG)), measure(check(PROMPTS)))[1]
    assert {len(row) for row in (header, overall, *rows)} == {5}
    assert overall[:2] == ("all", "6")
    assert overall[2].startswith("16.7 [") and overall[3].startswith("100.0 [") and overall[4].startswith("+83.3 [")
    assert [row[0] for row in rows[:2]] == ["category: single", "category: count"]
    assert next(row for row in rows if row[0] == "attribute: size")[4] == "one prompt only"


def test_scenes_refuse() -> None:
    white = Image.new("RGB", (64, 64), "white")
    with pytest.raises(ValueError, match="cannot read 'a photo of a dog'"):
        check_scenes([white], ["a photo of a dog"])
    with pytest.raises(ValueError, match="scenes: no responses"):
        measure([], [])
    single = measure(check(["a red circle"], ["a red circle"]), ["a red circle"])
    with pytest.raises(ValueError, match="an interval needs two"):
        compare_scenes(single, single)
