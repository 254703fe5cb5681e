"""POPE: splits worked out by hand, answers as the release and a person read them, and the files that people have."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmalign.evaluation.annotations import Question, read_objects
from mmalign.evaluation.benchmarks import pope
from mmalign.evaluation.benchmarks.pope import SPLITS, build, parse_published
from mmalign.language.yes_no import parse_strict
from tests.helpers.data_files import write_jsonl

# dog 3, cat 2, ball 2, tree 1, hat 1; with a dog: cat 2, ball 2, tree 1, hat 1; with a cat: dog 2, ball 1, tree 1
IMAGES = {"a": ["dog", "cat", "ball"], "b": ["dog", "cat", "tree"], "c": ["dog", "ball", "hat"], "few": ["dog"]}


def asked(questions: list[Question]) -> dict[str, list[str]]:
    """From each image to the objects asked for, "-" before those that are not there."""
    objects: dict[str, list[str]] = {}
    for question in questions:
        name = question.text.removeprefix("Is there a ").removesuffix(" in the image?")
        objects.setdefault(question.image, []).append(name if question.answer else f"-{name}")
    return objects


def test_build_popular_by_hand() -> None:
    """Absent objects by popularity, each asked for once; equals in the order in which they appear."""
    assert asked(build(IMAGES, "popular", objects_per_image=2)) == {
        "a": ["dog", "-tree", "cat", "-hat"],
        "b": ["dog", "-ball", "cat", "-hat"],
        "c": ["dog", "-cat", "ball", "-tree"],
    }


def test_build_adversarial_by_hand() -> None:
    """The company of the object before; where none of it is left, the only object that remains."""
    assert asked(build(IMAGES, "adversarial", objects_per_image=2)) == {
        "a": ["dog", "-tree", "cat", "-hat"],  # a cat's company is dog, ball (there) and tree (asked for)
        "b": ["dog", "-ball", "cat", "-hat"],
        "c": ["dog", "-cat", "ball", "-tree"],
    }


def test_adversarial_uses_cooccurrence_popular_frequency() -> None:
    """Beside a dog stand a leash and a bone, once each; a cat is in most images, and never beside a dog."""
    images = {
        "a": ["dog", "leash"],
        "b": ["dog", "bone"],
        "c": ["cat", "hat"],
        "d": ["cat", "hat"],
        "e": ["cat", "mat"],
    }
    assert asked(build(images, "popular", objects_per_image=1))["a"] == ["dog", "-cat"]
    objects = asked(build(images, "adversarial", objects_per_image=1))
    assert objects == {
        "a": ["dog", "-bone"],
        "b": ["dog", "-leash"],
        "c": ["cat", "-mat"],
        "d": ["cat", "-mat"],
        "e": ["cat", "-hat"],
    }


@pytest.mark.parametrize("split", SPLITS)
def test_build_laws_of_a_split(split: pope.Split) -> None:
    """Half of the questions are a yes, no question is asked twice, and every answer is true."""
    names = [f"thing{i}" for i in range(12)]
    images = {f"{i}.jpg": [names[(i * k) % 12] for k in range(1, 6)] for i in range(1, 40)}
    questions = build(images, split)
    assert [question.id for question in questions] == list(range(1, len(questions) + 1))
    assert len(questions) == 6 * sum(len(set(objects)) >= 3 for objects in images.values())
    assert [question.answer for question in questions] == [True, False] * (len(questions) // 2)
    assert len({(question.image, question.text) for question in questions}) == len(questions)
    for image, things in asked(questions).items():
        assert {name for name in things if name[0] != "-"} <= set(images[image])
        assert not {name[1:] for name in things if name[0] == "-"} & set(images[image])


def test_random_is_uniform_over_absent_objects() -> None:
    images = {f"{i}.jpg": ["dog"] for i in range(400)}
    names = ["dog", "cat", "hat", "tree", "ball", "car"]
    asked_for = asked(build(images, "random", objects_per_image=1, names=names))
    times = Counter(things[1] for things in asked_for.values())
    assert set(times) == {f"-{name}" for name in names[1:]}
    assert max(abs(number - 80) for number in times.values()) <= 32  # four standard deviations of 8


def test_build_random_does_not_depend_on_other_images() -> None:
    names = [f"thing{i}" for i in range(9)]
    images = {f"{i}.jpg": [names[i % 9], names[(i + 1) % 9], names[(i + 2) % 9]] for i in range(30)}
    fewer = {image: images[image] for image in ("3.jpg", "20.jpg", "7.jpg")}
    every = asked(build(images, "random", names=names))
    assert asked(build(fewer, "random", names=names)) == {image: every[image] for image in fewer}
    assert asked(build(images, "random", names=names, seed=1)) != every
    chosen = {question.image for question in build(images, "random", num_images=10, names=names)}
    later = {**images, "new.jpg": ["thing0", "thing1", "thing2"]}
    assert len(chosen) == 10
    assert len(chosen & {question.image for question in build(later, "random", num_images=10, names=names)}) >= 9


def test_build_articles_and_templates() -> None:
    texts = [q.text for q in build({"a": ["apple"], "b": ["hot dog"]}, "popular", objects_per_image=1)]
    assert texts[:2] == ["Is there an apple in the image?", "Is there a hot dog in the image?"]  # no "imange"
    (first, _) = build({"a": ["owl"]}, "random", objects_per_image=1, names=["fox"], template="Do you see {}?")
    assert first.text == "Do you see an owl?"


def test_build_counts_an_object_annotated_twice_once() -> None:
    assert asked(build({"a": ["dog", "dog", "cat"], "b": ["hat", "tree"]}, "popular", objects_per_image=2))["a"] == [
        *("dog", "-hat", "cat", "-tree")
    ]


def test_build_refuses() -> None:
    with pytest.raises(ValueError, match="3 of 4 images have 2 objects or more, 4 are asked for"):
        build(IMAGES, "random", num_images=4, objects_per_image=2)
    with pytest.raises(ValueError, match="0 of 0 images"):
        build({}, "random")
    with pytest.raises(ValueError, match="image a has 3 of 5 objects, fewer than 3 are absent"):
        build(IMAGES, "popular")
    with pytest.raises(ValueError, match="'hard' is not a split"):
        build(IMAGES, "hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no \{\}"):
        build(IMAGES, "random", template="Is it there?")


@pytest.mark.parametrize(
    ("answer", "published", "strict"),
    [
        ("Yes", True, True),
        ("No", False, False),
        ("yes.", True, True),
        ("No, there is no dog.", False, False),
        ("There is not a dog in the image.", False, False),
        ("Yes. There is no cat, though.", True, True),  # only the first sentence counts
        ("Yes, there is no doubt", False, True),  # the release sees a "no"
        ("NO", True, False),  # ... and only these three spellings
        ("I cannot see a dog", True, False),
        ("There isn't one", True, False),
        ("There isn\u2019t one", True, False),
        ("Nope", True, False),
        ("No\nThe image shows a cat", True, False),  # the release splits at spaces alone
        ("no!", True, False),
        ("There is a notebook", True, True),
        ("I see a dog", True, True),
        ("The answer is yes", True, True),
        ("A cat on a mat", True, None),
        ("", True, None),
        ("...", True, None),
    ],
)
def test_parsers_of_answers(answer: str, published: bool, strict: bool | None) -> None:
    assert parse_published(answer) is published
    assert parse_strict(answer) is strict


def twelve() -> tuple[list[Question], list[str]]:
    """Six true yes and six true no; right yes 3, wrong yes 4, right no 2, wrong no 3."""
    questions = [Question(i, f"{i // 2}", f"Is there a thing{i} in the image?", i < 6) for i in range(12)]
    answers = ["Yes", "yes.", "Yes, it is", "No", "no", "not there", "Yes", "yes", "", "a cat", "No", "There is no one"]
    return questions, answers


def test_score_by_hand() -> None:
    """Accuracy 5 / 12, precision 3 / 7, recall 3 / 6, F1 2 * 3 / (7 + 6), yes rate 7 / 12; two say neither."""
    questions, answers = twelve()
    metrics = pope.score({"random": questions}, {"random": answers})
    values = metrics.values
    assert len(set(metrics.groups)) == 6  # two questions about each image
    assert values == pytest.approx(
        {
            "random: accuracy": 5 / 12,
            "random: precision": 3 / 7,
            "random: recall": 3 / 6,
            "random: F1": 6 / 13,
            "random: yes rate": 7 / 12,
            "random: unclear": 2 / 12,
        }
    )
    assert [round(value, 5) for value in list(values.values())[:5]] == [0.41667, 0.42857, 0.5, 0.46154, 0.58333]


def test_score_of_strict_answers_by_hand() -> None:
    """The two unclear ones are no yes any more, and still wrong: precision 3 / 5, F1 6 / (5 + 6)."""
    questions, answers = twelve()
    values = pope.score({"random": questions}, {"random": answers}, parse_strict).values
    assert values["random: accuracy"] == 5 / 12
    assert values["random: precision"] == 3 / 5
    assert values["random: F1"] == 6 / 11
    assert values["random: yes rate"] == 5 / 12


def test_score_of_a_model_that_never_says_yes() -> None:
    questions, _ = twelve()
    values = pope.score({"random": questions}, {"random": ["no"] * 12}).values
    assert (values["random: precision"], values["random: recall"], values["random: F1"]) == (0, 0, 0)
    assert values["random: accuracy"] == 1 / 2


def test_score_averages_splits_without_pooling() -> None:
    questions, answers = twelve()
    easy = questions[:2], ["Yes", "Yes"]
    values = pope.score({"random": questions, "popular": easy[0]}, {"random": answers, "popular": easy[1]}).values
    assert values["mean: accuracy"] == pytest.approx((5 / 12 + 1) / 2)
    assert values["mean: F1"] == pytest.approx((6 / 13 + 1) / 2)
    assert values["mean: yes rate"] == pytest.approx((7 / 12 + 1) / 2)
    assert values["mean: unclear"] == pytest.approx(1 / 12)


def test_score_refuses() -> None:
    questions, answers = twelve()
    with pytest.raises(ValueError, match="POPE: no responses"):
        pope.score({}, {})
    with pytest.raises(ValueError, match="questions of random, answers to popular"):
        pope.score({"random": questions}, {"popular": answers})
    with pytest.raises(ValueError, match="random has 12 questions and 11 answers"):
        pope.score({"random": questions}, {"random": answers[:11]})
    with pytest.raises(ValueError, match="POPE: random, 0 is answered twice"):
        pope.score({"random": [questions[0]] * 2}, {"random": ["no", "no"]})


QUESTIONS = [
    Question(1, "a.jpg", "Is there a dog in the image?", True),
    Question(2, "a.jpg", "Is there an owl in the image?", False),
]
ROWS = [
    {"question_id": q.id, "image": q.image, "text": q.text, "label": "yes" if q.answer else "no"} for q in QUESTIONS
]


def read_questions(path: Path) -> list[Question]:
    return [question for asked in pope.read_splits({"": path}).values() for question in asked]


def test_read_questions_and_annotations(tmp_path: Path) -> None:
    # JSON lines, named .json
    assert read_questions(write_jsonl(tmp_path / "coco_pope_random.json", *ROWS)) == QUESTIONS
    assert read_questions(write_jsonl(tmp_path / "list.json", ROWS)) == QUESTIONS
    objects = write_jsonl(
        tmp_path / "objects.json", {"image": "a.jpg", "objects": ["dog", "cat", "dog"], "image_id": 4}
    )
    assert read_objects(objects) == {"a.jpg": ("dog", "cat")}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"question_id": 1}, "line 2: duplicate question_id 1"),
        ({"question_id": "1"}, "line 2: duplicate question_id 1"),
        ({"question_id": 1.5}, "question_id is 1.5; expected a number or a name"),
        ({"label": "maybe"}, 'label is "maybe"; expected "yes" or "no"'),
        ({"text": 3}, "text or question is 3; expected a string"),
    ],
)
def test_read_questions_refuses_bad_records(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        read_questions(write_jsonl(tmp_path / "q.json", ROWS[0], {**ROWS[1], **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"label": "Yes"},
        {"label": "YES."},
        {"question_id": "1"},
        {"text": "<image>\nIs there a dog in the image?"},
        {"text": "Is there a dog in the image?\n<image>"},
    ],
)
def test_read_questions_of_other_writers(change: dict[str, Any], tmp_path: Path) -> None:
    assert read_questions(write_jsonl(tmp_path / "q.json", {**ROWS[0], **change})) == QUESTIONS[:1]


def test_question_ids_may_be_names(tmp_path: Path) -> None:
    rows = [{**row, "question_id": f"q{row['question_id']}"} for row in ROWS]
    questions = read_questions(write_jsonl(tmp_path / "q.json", *rows))
    assert [question.id for question in questions] == ["q1", "q2"]
    answers = [{"question_id": "q2", "text": "No"}, {"question_id": "q1", "text": "Yes"}]
    assert pope.read_answers(write_jsonl(tmp_path / "a.jsonl", *answers), questions) == ["Yes", "No"]


SUFFIX = "Answer the question using a single word or phrase."


def test_llava_s_file_has_splits_and_takes_its_labels_from_the_release(tmp_path: Path) -> None:
    """llava_pope_test.jsonl: ids of its own, a category, a suffix, no label; old files of the release say "imange"."""
    rows = [
        {"question_id": 10 * n + i, "image": "a.jpg", "text": f"{ROWS[i]['text']}\n{SUFFIX}", "category": split}
        for n, split in enumerate(("adversarial", "popular"))
        for i in range(2)
    ]
    file = write_jsonl(tmp_path / "llava_pope_test.jsonl", *rows)
    release = write_jsonl(tmp_path / "r.json", {**ROWS[0], "text": "Is there a dog in the imange?"}, ROWS[1])
    splits = pope.read_splits({"": file}, pope.read_labels([release]))
    ids = {split: [(q.id, q.answer) for q in asked] for split, asked in splits.items()}
    assert ids == {"adversarial": [(0, True), (1, False)], "popular": [(10, True), (11, False)]}
    with pytest.raises(ValueError, match=r"line 1 has .* expected 'label' yes or no; or name POPE's files"):
        pope.read_splits({"": file})
    with pytest.raises(ValueError, match=r"line 1: no label for .* about a.jpg; use labels of the same release"):
        pope.read_splits({"": file}, pope.read_labels([write_jsonl(tmp_path / "r.json", ROWS[1])]))
    with pytest.raises(ValueError, match="line 2: label contradicts an earlier one"):
        pope.read_labels([write_jsonl(tmp_path / "r.json", ROWS[0], {**ROWS[0], "label": "no"})])


def test_category_that_is_no_split_is_left_alone(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "mine.json", *({**row, "category": "animals"} for row in ROWS))
    assert pope.read_splits({"": file}) == {"mine": QUESTIONS}


def test_read_questions_refuses_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty; expected POPE's questions"):
        read_questions(write_jsonl(tmp_path / "q.json"))


def test_read_answers(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with_ids = [{"question_id": 2, "prompt": "...", "text": "No"}, {"question_id": 1, "prompt": "...", "text": "Yes"}]
    assert pope.read_answers(write_jsonl(file, *with_ids), QUESTIONS) == ["Yes", "No"]
    in_order = [
        {"question": "is there a dog in the image?", "answer": "yes"},
        {"prompt": f"{QUESTIONS[1].text}\nAnswer with one word.", "answer": ""},
    ]
    assert pope.read_answers(write_jsonl(file, *in_order), QUESTIONS) == ["yes", ""]
    thought = [{"question_id": 1, "text": "<think>No?</think>\nYes"}, {"question_id": 2, "text": "<think>There is"}]
    assert pope.read_answers(write_jsonl(file, *thought), QUESTIONS) == ["Yes", ""]


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([], "has 0 answers to 2 questions"),
        ([{"question_id": 1, "text": ""}], r"has no answer to 1 of 2 questions \(2\)"),
        (
            [{"question_id": 1, "text": ""}, {"question_id": 3, "text": ""}],
            r"question_id 3 is none of the 2 questions \(1 to 2\)",
        ),
        ([{"question_id": 1, "text": ""}, {"question_id": 1, "text": ""}], "line 2: duplicate question_id 1"),
        ([{"question_id": 1, "text": ""}, {"answer": ""}], "1 of 2 records have a question_id; expected all, or none"),
        ([{"question_id": 1, "text": None}, {"question_id": 2, "text": ""}], "is null; expected a string"),
        ([{"question": QUESTIONS[1].text, "answer": ""}] * 2, "line 1 answers .* but question 1 is .* in the order"),
        ([{"answer": "yes"}] * 2, r"""has \["answer"\]; expected 'question' or 'prompt'"""),
    ],
)
def test_read_answers_refuses_bad_records(records: list[Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        pope.read_answers(write_jsonl(tmp_path / "answers.jsonl", *records), QUESTIONS)
