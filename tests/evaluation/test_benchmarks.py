"""Benchmarks on files as people have them: what is asked, and what single answers are worth."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data.images import BadImage
from mmalign.evaluation import amber, object_halbench, pope
from mmalign.evaluation.benchmarks import DESCRIPTIONS, Amber, Descriptions, Question, YesNo, in_folder, read_asked
from mmalign.language.objects import vocabulary
from tests.helpers import data_files

WORDS = vocabulary({"dog": ["puppy"], "cat": [], "ball": []})
ASKED = [Question(1, "1.jpg", "Describe it."), Question(2, "COCO_val2014_000000000042.jpg", "Describe it.")]
TRUTH = {"1.jpg": frozenset({"dog", "ball"}), "42": frozenset({"cat"})}


def written(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def nowhere(name: str) -> Any:
    raise AssertionError(f"{name} was read")


# --------------------------------------------------------------------------------------------------------- descriptions


def test_descriptions_are_counted_and_judged() -> None:
    benchmark = Descriptions(ASKED, TRUTH, WORDS, nowhere)
    texts = ["A puppy with a cat.", "A cat."]
    (counts,) = benchmark.score({DESCRIPTIONS: texts})
    assert counts.benchmark == "CHAIR"
    assert counts.values == {"CHAIR_i": 1 / 3, "CHAIR_s": 0.5, "recall": 2 / 3, "words per response": 3.5}
    verdict = benchmark.judge(DESCRIPTIONS, 0, texts[0])
    assert (verdict.score, verdict.note) == (0, "1 of 2 named, 1 invented")
    assert [texts[0][start:end] for start, end in verdict.invented] == ["cat"]
    assert benchmark.judge(DESCRIPTIONS, 1, texts[1]).note == "1 of 1 named, none invented"
    assert [benchmark.truth(DESCRIPTIONS, number) for number in (0, 1)] == ["ball, dog", "cat"]


def test_object_halbench_counts_the_same_answers_its_own_way() -> None:
    benchmark = Descriptions(ASKED, TRUTH, WORDS, nowhere, object_halbench.score)
    (counts,) = benchmark.score({DESCRIPTIONS: ["A puppy with a cat.", "Nothing."]})
    assert counts.benchmark == "Object HalBench" and counts.values["response-level"] == 1


def test_images_need_an_annotation_and_one_question_of_a_kind() -> None:
    with pytest.raises(ValueError, match=r"annotations: 1 of 2 images have no annotation \(42; annotated are 1.jpg"):
        Descriptions(ASKED, {"1.jpg": frozenset()}, WORDS, nowhere)
    twice = [ASKED[1], Question(3, "42", "Describe it.")]
    with pytest.raises(ValueError, match=r"'Describe it.' is asked twice of image 42"):
        Descriptions(twice, TRUTH, WORDS, nowhere)


# -------------------------------------------------------------------------------------------------------------- yes, no


def test_yes_and_no() -> None:
    questions = [pope.Question(1, "a", "Is there a dog?", True), pope.Question(2, "b", "Is there a cat?", False)]
    benchmark = YesNo({"random": questions}, nowhere)
    (counts,) = benchmark.score({"random": ["Yes", "Yes, there is a cat."]})
    assert counts.values["random: accuracy"] == 0.5 and counts.headline_names[0] == "random: accuracy"
    assert benchmark.judge("random", 1, "Yes, there is a cat.").invented == ((0, 20),)
    assert [benchmark.truth("random", number) for number in (0, 1)] == ["yes", "no"]
    assert benchmark.without({"b"}).parts == {"random": questions[:1]}


# ---------------------------------------------------------------------------------------------------------------- AMBER

ITEMS: dict[int, amber.Description | amber.Claim] = {
    1: amber.Description(("dog", "tree"), ("cat",)),
    2: amber.Claim("existence", False),
}
FILES = amber.Amber(ITEMS, {"dog": (), "tree": ("forest",), "cat": ()})


def test_amber_asks_and_counts_both_kinds() -> None:
    questions = [Question(1, "1.jpg", "Describe this image."), Question(2, "1.jpg", "Is there a cat?")]
    benchmark = Amber(questions, FILES, nowhere)
    assert {part: [q.id for q in asked] for part, asked in benchmark.parts.items()} == {
        "descriptions": [1],
        "questions": [2],
    }
    told = "A dog in the forest. Two cats!"
    generative, discriminative = benchmark.score({"descriptions": [told], "questions": ["No."]})
    assert generative.values["CHAIR"] == 1 / 3 and generative.values["Cover"] == 1
    assert discriminative.values["all: accuracy"] == 1 and discriminative.values["all: yes rate"] == 0
    verdict = benchmark.judge("descriptions", 0, told)
    assert (verdict.score, verdict.note) == (1, "2 of 2 named, 1 invented")
    assert [told[start:end] for start, end in verdict.invented] == ["cats"]
    assert benchmark.judge("questions", 0, "Yes").note == "wrong"
    assert [benchmark.truth(part, 0) for part in benchmark.parts] == ["dog, tree", "no"]


def test_amber_refuses_questions_of_another_release() -> None:
    with pytest.raises(ValueError, match=r"id 3 is none of annotations.json"):
        Amber([Question(3, "1.jpg", "What?")], FILES, nowhere)


# ---------------------------------------------------------------------------------------------------------------- files


def test_questions_in_the_layouts_that_people_have(tmp_path: Path) -> None:
    file = written(
        tmp_path / "q.jsonl",
        {"question_id": 7, "image": "a.jpg", "text": "What is it?", "category": "conv"},  # LLaVA
        {"image": "b.jpg", "question": "And that?"},
        {"id": 9, "image": "c.jpg", "query": "Describe this image."},  # AMBER
        {"image": "d.jpg", "objects": ["dog"]},  # annotations, with nothing asked
    )
    assert read_asked(file, "Describe this image.") == [
        Question(7, "a.jpg", "What is it?"),
        Question(2, "b.jpg", "And that?"),
        Question(9, "c.jpg", "Describe this image."),
        Question(4, "d.jpg", "Describe this image."),
    ]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"text": "What?"}], r"q.jsonl: entry 1 has \[\"text\"\]; expected 'image'"),
        ([{"image": "a", "text": 3}], r"text is 3; expected a string"),
        ([{"image": "a", "question_id": "one"}], 'question_id is "one"; expected a whole number'),
        ([{"image": "a", "id": 1}, {"image": "b", "id": 1}], "line 2: question_id 1 stands there twice"),
        ([], "q.jsonl is empty; expected records"),
    ],
)
def test_bad_questions(records: list[Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_asked(written(tmp_path / "q.jsonl", *records), "What?")


def test_images_are_there_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(data_files.png(0))
    with pytest.raises(ValueError, match=r"has no COCO_val2014_000000000042.jpg \(1 of 2 images are missing\)"):
        in_folder(tmp_path, ASKED)
    images = in_folder(tmp_path, ASKED[:1])
    assert images("1.jpg").size == (16, 16)
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"1.jpg: is not a readable image"):
        images("1.jpg")
