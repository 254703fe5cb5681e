"""Benchmarks: scores of all answers, ratings of single ones, and files of questions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.images import BadImage
from mmalign.evaluation.annotations import Question, match_images, read_questions
from mmalign.evaluation.benchmarks import amber, object_halbench, pope
from mmalign.evaluation.benchmarks.base import (
    CAPTIONS,
    RatedAnswer,
    amber_benchmark,
    caption_benchmark,
    open_folder,
    yes_no_benchmark,
)
from mmalign.language.objects import vocabulary
from mmalign.language.yes_no import parse_strict
from tests.helpers import data_files
from tests.helpers.data_files import write_jsonl

WORDS = vocabulary({"dog": ["puppy"], "cat": [], "ball": []})
ASKED = [Question(1, "1.jpg", "Describe it."), Question(2, "COCO_val2014_000000000042.jpg", "Describe it.")]
TRUTH = {"1.jpg": frozenset({"dog", "ball"}), "42": frozenset({"cat"})}


def no_images(name: str) -> Any:
    raise AssertionError(f"{name} was read")


def test_captions_are_scored_and_rated() -> None:
    benchmark = caption_benchmark(ASKED, TRUTH, WORDS, no_images)
    texts = ["A puppy with a cat.", "A cat."]
    (metrics,) = benchmark.score({CAPTIONS: texts})
    assert metrics.benchmark == "CHAIR"
    assert metrics.values == {"CHAIR_i": 1 / 3, "CHAIR_s": 0.5, "recall": 2 / 3, "words per response": 3.5}
    verdicts = [item.rate(text) for item, text in zip(benchmark.parts[CAPTIONS], texts, strict=True)]
    assert [verdict.score for verdict in verdicts] == [0, 1]
    assert [verdict.note for verdict in verdicts] == ["1 of 2 named, 1 invented", "1 of 1 named, none invented"]
    assert [texts[0][start:end] for start, end in verdicts[0].invented] == ["cat"]
    assert [item.truth for item in benchmark.parts[CAPTIONS]] == ["ball, dog", "cat"]


def test_captions_are_scored_by_object_halbench() -> None:
    benchmark = caption_benchmark(ASKED, TRUTH, WORDS, no_images, object_halbench.score)
    (metrics,) = benchmark.score({CAPTIONS: ["A puppy with a cat.", "Nothing."]})
    assert metrics.benchmark == "Object HalBench" and metrics.values["response-level"] == 1


def test_captions_refuse_unannotated_and_repeated_images() -> None:
    with pytest.raises(ValueError, match=r"annotations: 1 of 2 images have no annotation \(42; annotated are 1.jpg"):
        caption_benchmark(ASKED, {"1.jpg": frozenset()}, WORDS, no_images)
    with pytest.raises(ValueError, match=r"'Describe it.' is asked twice of image 42"):
        caption_benchmark([ASKED[1], Question(3, "42", "Describe it.")], TRUTH, WORDS, no_images)


def test_questions_may_name_images_by_another_path() -> None:
    """Two annotated images of one stem are never confused: such a name stays unknown."""
    asked = [Question(1, "val/1.jpg", "Describe it."), Question(2, "val2014/COCO_val2014_000000000042", "Describe it.")]
    benchmark = caption_benchmark(asked, TRUTH, WORDS, no_images)
    (metrics,) = benchmark.score({CAPTIONS: ["A dog.", "A cat."]})
    assert metrics.groups == ("1.jpg", "42") and metrics.values["CHAIR_i"] == 0
    assert match_images(["x/1.jpg", "1", "y.jpg"], ["a/1.jpg", "b/1.png", "y.jpg"]) == ["a/1.jpg", "1", "y.jpg"]


def test_yes_no_answers_are_scored_and_rated() -> None:
    questions = [Question(1, "a", "Is there a dog?", True), Question(2, "b", "Is there a cat?", False)]
    benchmark = yes_no_benchmark({"random": questions}, no_images)
    (metrics,) = benchmark.score({"random": ["Yes", "Yes, there is a cat."]})
    assert metrics.values["random: accuracy"] == 0.5 and metrics.headline_names[0] == "random: accuracy"
    assert benchmark.parts["random"][1].rate("Yes, there is a cat.").invented == ((0, 20),)
    assert [item.truth for item in benchmark.parts["random"]] == ["yes", "no"]
    assert benchmark.without_images({"b"}).questions == questions[:1]


@pytest.mark.parametrize("answer", ["8s a", "I am not sure.", ""])
@pytest.mark.parametrize("parse", [pope.parse_published, parse_strict])
def test_unclear_answer_has_a_label_of_its_own(answer: str, parse: pope.Parse) -> None:
    """The published parser takes it for a yes or a no; a person who reads the page sees neither."""
    benchmark = yes_no_benchmark({"random": [Question(1, "a", "Is there a dog?", True)]}, no_images, parse)
    assert benchmark.parts["random"][0].rate(answer) == RatedAnswer(answer, 0, "unclear")


ITEMS: dict[int, amber.AnyItem] = {
    1: amber.GenerativeItem(("dog", "tree"), ("cat",)),
    2: amber.DiscriminativeItem("existence", False),
}
ANNOTATIONS = amber.Annotations(ITEMS, {"dog": (), "tree": ("forest",), "cat": ()})


def test_amber_scores_and_rates_both_kinds() -> None:
    questions = [Question(1, "1.jpg", "Describe this image."), Question(2, "1.jpg", "Is there a cat?")]
    benchmark = amber_benchmark(questions, ANNOTATIONS, no_images)
    assert {part: [item.question.id for item in items] for part, items in benchmark.parts.items()} == {
        "descriptions": [1],
        "questions": [2],
    }
    caption = "A dog in the forest. Two cats!"
    generative, discriminative, _ = benchmark.score({"descriptions": [caption], "questions": ["No."]})
    assert generative.values["CHAIR"] == 1 / 3 and generative.values["Cover"] == 1
    assert discriminative.values["all: accuracy"] == 1 and discriminative.values["all: yes rate"] == 0
    caption_item, claim_item = (items[0] for items in benchmark.parts.values())
    verdict = caption_item.rate(caption)
    assert (verdict.score, verdict.note) == (1, "2 of 2 named, 1 invented")
    assert [caption[start:end] for start, end in verdict.invented] == ["cats"]
    assert claim_item.rate("Yes").note == "wrong"
    assert (caption_item.truth, claim_item.truth) == ("dog, tree", "no")


def test_amber_refuses_questions_of_another_release() -> None:
    with pytest.raises(ValueError, match=r"id 3 is not in annotations.json"):
        amber_benchmark([Question(3, "1.jpg", "What?")], ANNOTATIONS, no_images)


def test_read_questions_in_common_formats(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "q.jsonl",
        {"question_id": 7, "image": "a.jpg", "text": "What is it?", "category": "conv"},  # LLaVA
        {"image": "b.jpg", "question": "And that?"},
        {"id": 9, "image": "c.jpg", "query": "Describe this image."},  # AMBER
        {"image": "d.jpg", "objects": ["dog"]},  # annotations, without a question
        {"question_id": "q5", "image": "e.jpg", "text": "<image>\nWhat is it?"},
    )
    assert read_questions(file, "Describe this image.") == [
        Question(7, "a.jpg", "What is it?"),
        Question(2, "b.jpg", "And that?"),
        Question(9, "c.jpg", "Describe this image."),
        Question(4, "d.jpg", "Describe this image."),
        Question("q5", "e.jpg", "What is it?"),
    ]


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([{"text": "What?"}], r"q.jsonl: line 1 has \[\"text\"\]; expected 'image'"),
        ([{"image": "a", "text": 3}], r"text is 3; expected a string"),
        ([{"image": "a", "question_id": None}], "question_id is null; expected a number or a name"),
        ([{"image": "a", "id": 1}, {"image": "b", "id": 1}], "line 2: duplicate question_id 1"),
        ([], "q.jsonl is empty; expected records"),
    ],
)
def test_read_questions_refuses_bad_records(records: list[Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        read_questions(write_jsonl(tmp_path / "q.jsonl", *records), "What?")


def test_open_folder_finds_accents_in_either_form(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301.png").write_bytes(data_files.png(0))
    asked = replace(ASKED[0], image="caf\u00e9.png")
    assert open_folder(tmp_path, [asked])(asked.image).size == (16, 16)


def test_open_folder_checks_that_images_are_there(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(data_files.png(0))
    with pytest.raises(ValueError, match=r"has no COCO_val2014_000000000042.jpg \(1 of 2 images are missing\)"):
        open_folder(tmp_path, ASKED)
    images = open_folder(tmp_path, ASKED[:1])
    assert images("1.jpg").size == (16, 16)
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"1.jpg: is not a readable image"):
        images("1.jpg")
