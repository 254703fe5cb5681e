"""Object HalBench by rules, on descriptions counted by hand."""

import json
from pathlib import Path

import pytest

from mmalign.evaluation.annotations import Response, read_responses
from mmalign.evaluation.benchmarks import chair, object_halbench
from mmalign.evaluation.metrics import compare
from mmalign.language.objects import coco_vocabulary, vocabulary

TRUTH = {
    "1": frozenset({"person", "dog"}),
    "2": frozenset({"hot dog", "dining table"}),
    "3": frozenset[str](),
    "4": frozenset({"bus"}),
}
RESPONSES = [
    Response("1", "A man and his puppy. Two dogs and a cat."),
    Response("2", "Hot dogs on a table."),
    Response("3", "A chair, another chair"),
    Response("4", "It rains."),  # names no object, so the response-level rate leaves it out
]


def test_score_by_hand() -> None:
    """2 of the 3 responses that name an object, 3 of 8 mentions, 4 of 5 objects, 10 + 5 + 4 + 2 words."""
    rates = {"response-level": 2 / 3, "mention-level": 3 / 8, "recall": 4 / 5, "words per response": 21 / 4}
    assert object_halbench.score(RESPONSES, TRUTH).values == rates
    assert chair.score(RESPONSES, TRUTH, coco_vocabulary("refined")).values["CHAIR_s"] == 2 / 4
    # Words man, puppy, dog, cat; hot dog, table; chair: two of seven invented.
    assert object_halbench.score(RESPONSES, TRUTH, distinct=True).values == {**rates, "mention-level": 2 / 7}


def test_score_of_responses_without_objects() -> None:
    metrics = object_halbench.score([Response("1", ""), Response("4", "Rain.")], TRUTH)
    assert metrics.values == {"response-level": 0, "mention-level": 0, "recall": 0, "words per response": 0.5}


def test_score_uses_the_refined_vocabulary_or_another() -> None:
    metrics = object_halbench.score([Response("1", "A pedestrian."), Response("4", "A cheesecake.")], TRUTH)
    assert (metrics.values["mention-level"], metrics.values["recall"]) == (1 / 2, 1 / 3)
    shapes = vocabulary({"circle": [], "star": []})
    assert object_halbench.score([Response("1", "A star.")], {"1": ["circle"]}, shapes).values["response-level"] == 1


def test_compare_two_models() -> None:
    better = [*RESPONSES[:2], Response("3", "A wall"), Response("4", "A bus")]
    comparison = compare(object_halbench.score(RESPONSES, TRUTH), object_halbench.score(better, TRUTH))
    assert comparison.differences["response-level"].estimate == pytest.approx(1 / 3 - 2 / 3)
    assert comparison.differences["mention-level"].estimate == pytest.approx(1 / 7 - 3 / 8)
    assert [row[0] for row in comparison.table()][1:3] == ["response-level, %", "mention-level, %"]
    assert json.loads(json.dumps(comparison.as_dict()))["benchmark"] == "Object HalBench"


def test_read_responses_beside_their_questions(tmp_path: Path) -> None:
    """The release's answers name no image: the file of questions does, line by line."""
    asked = [{"image_id": 1, "question": "Describe it."}, {"image_id": 4, "question": "What is there?"}]
    answers = [
        {"question": row["question"], "text": text} for row, text in zip(asked, ("A dog.", "A bus."), strict=True)
    ]
    for name, rows in (("q.jsonl", asked), ("a.jsonl", answers)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    responses = read_responses(tmp_path / "a.jsonl", tmp_path / "q.jsonl")
    assert responses == [Response("1", "A dog.", "Describe it."), Response("4", "A bus.", "What is there?")]
    assert object_halbench.score(responses, TRUTH).values["recall"] == 2 / 3


def test_score_refuses() -> None:
    with pytest.raises(ValueError, match="Object HalBench: there is no response"):
        object_halbench.score([], TRUTH)
    with pytest.raises(ValueError, match="images have no annotation"):
        object_halbench.score([Response("9", "")], TRUTH)
