"""CHAIR on descriptions counted by hand, and its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.evaluation.annotations import Response, image_id, read_responses
from mmalign.evaluation.benchmarks import chair
from mmalign.language.objects import coco_vocabulary, vocabulary
from tests.helpers.data_files import write_jsonl

COCO = coco_vocabulary("refined")
TRUTH = {
    "1": frozenset({"person", "dog"}),
    "2": frozenset({"hot dog", "dining table"}),
    "3": frozenset[str](),
    "4": frozenset({"bus"}),
}
RESPONSES = [
    Response("1", "A man and his puppy. Two dogs and a cat."),  # 4 mentions: person, dog, dog, and an invented cat
    Response("2", "Hot dogs on a table."),  # 2 mentions, both true, and no dog
    Response("3", "A chair, another chair"),  # 2 mentions, both invented: nothing is in the image
    Response("4", ""),  # no mention, and the bus missed
]


def test_match_objects_of_a_description() -> None:
    match = chair.match_objects(RESPONSES[0].text, TRUTH["1"], COCO)
    assert [mention.object for mention in match.mentions] == ["person", "dog", "dog", "cat"]
    assert [(mention.word, mention.start, mention.end) for mention in match.invented] == [("cat", 36, 39)]
    assert match.present == {"person", "dog"}


def test_score_by_hand() -> None:
    """3 of 8 mentions are invented, in 2 of 4 descriptions; 4 of 5 objects are metrics; 10 + 5 + 4 + 0 words."""
    metrics = chair.score(RESPONSES, TRUTH, COCO)
    assert metrics.values == {"CHAIR_i": 3 / 8, "CHAIR_s": 2 / 4, "recall": 4 / 5, "words per response": 19 / 4}


@pytest.mark.parametrize(
    ("responses", "values"),
    [
        # A cat named three times is three invented mentions; a dog named twice, by two words, is found once.
        ({"1": "A cat, a kitten, a cat. A dog, a puppy."}, (3 / 5, 1, 1 / 2, 10)),
        # A model that says nothing invents nothing and finds nothing.
        ({"1": "", "4": "It is sunny."}, (0, 0, 0, 1.5)),
        # An image without objects does not count in recall.
        ({"3": "Fog."}, (0, 0, 0, 1)),
        ({"3": "Fog.", "4": "A bus."}, (0, 0, 1, 1.5)),
    ],
)
def test_score_of_special_cases(responses: dict[str, str], values: tuple[float, ...]) -> None:
    metrics = chair.score([Response(image, text) for image, text in responses.items()], TRUTH, COCO)
    assert tuple(metrics.values.values()) == values


def test_score_depends_on_the_vocabulary() -> None:
    """As published, "motor bike" and "cheesecake" are never metrics, so that nothing is invented here."""
    responses = [Response("1", "A motor bike and a cheesecake."), Response("4", "A bus.")]
    rates = [
        chair.score(responses, TRUTH, coco_vocabulary(name)).values["CHAIR_s"] for name in ("published", "refined")
    ]
    assert rates == [0, 0.5]


def test_score_with_another_vocabulary() -> None:
    shapes = vocabulary({"red circle": [], "blue square": [], "green star": []})
    metrics = chair.score(
        [Response("a", "Two red circles and a green star.")], {"a": ["red circle", "blue square"]}, shapes
    )
    assert metrics.values == {"CHAIR_i": 1 / 2, "CHAIR_s": 1, "recall": 1 / 2, "words per response": 7}


def test_score_refuses() -> None:
    with pytest.raises(ValueError, match="CHAIR: no responses"):
        chair.score([], TRUTH, COCO)
    with pytest.raises(ValueError, match=r"2 of 3 images have no annotation \(7, 8; annotated are 1, 2, 3, ...\)"):
        chair.score([Response("8", ""), Response("1", ""), Response("7", "")], TRUTH, COCO)
    with pytest.raises(ValueError, match="CHAIR: 1 is answered twice"):
        chair.score([RESPONSES[0], RESPONSES[0]], TRUTH, COCO)
    with pytest.raises(ValueError, match="image 1 has the object 'puppy', which the vocabulary"):
        chair.score([RESPONSES[0]], {"1": ["puppy"]}, COCO)


def test_questions_about_an_image_are_one_group() -> None:
    responses = [Response("1", "A dog", "What is it?"), Response("1", "A cat", "Describe it."), Response("4", "")]
    metrics = chair.score(responses, TRUTH, COCO)
    assert (len(metrics.keys), len(set(metrics.groups))) == (3, 2)


@pytest.mark.parametrize(
    "value", [42, "42", "COCO_val2014_000000000042.jpg", "000000000042.jpg", "COCO_val2014_000000000042"]
)
def test_image_id_is_the_number(value: object) -> None:
    assert image_id(value) == "42"


@pytest.mark.parametrize("folder", ["val2014/", "/data/coco/val2014/", "C:\\coco\\"])
def test_image_id_ignores_folders_of_mscoco(folder: str) -> None:
    assert image_id(f"{folder}COCO_val2014_000000000042.jpg") == "42"


def test_message_about_no_annotation_at_all() -> None:
    with pytest.raises(ValueError, match=r"\(42; annotated are none\)"):
        chair.score([Response("42", "A dog.")], {}, COCO)


def test_image_id_keeps_other_names() -> None:
    assert [image_id(name) for name in ("cat_42.jpg", "042.png", "a/b.jpg")] == ["cat_42.jpg", "042.png", "a/b.jpg"]


def test_read_responses(tmp_path: Path) -> None:
    expected = [Response("1", "A dog."), Response("2", "")]
    rows = [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": ""}]
    assert read_responses(write_jsonl(tmp_path / "a.jsonl", *rows)) == expected
    assert read_responses(write_jsonl(tmp_path / "b.json", rows)) == expected
    toolkit = {"overall": {"SPICE": 0.2}, "imgToEval": {"1": rows[0], "2": rows[1]}}
    assert read_responses(write_jsonl(tmp_path / "c.json", toolkit)) == expected
    assert read_responses(write_jsonl(tmp_path / "d.json", rows[0])) == expected[:1]  # JSON lines, and one line
    asked = {"image": "COCO_val2014_000000000001.jpg", "prompt": "Describe it.", "text": "Assistant: A dog."}
    assert read_responses(write_jsonl(tmp_path / "e.jsonl", asked)) == [Response("1", "A dog.", "Describe it.")]


def test_read_responses_beside_their_questions(tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", {"question_id": 5, "image_id": 1}, {"question_id": 6, "image_id": 2})
    answers = write_jsonl(tmp_path / "a.jsonl", {"question_id": 5, "text": "A dog."}, {"answer": "A cat."})
    assert read_responses(answers, questions) == [Response("1", "A dog."), Response("2", "A cat.")]
    with pytest.raises(ValueError, match=r"a.jsonl: line 1 answers question_id 7, but q.jsonl: line 1 is 5"):
        read_responses(write_jsonl(answers, {"question_id": 7, "text": ""}, {"text": ""}), questions)
    with pytest.raises(ValueError, match=r"has 1 answers, .* has 2 questions"):
        read_responses(write_jsonl(answers, {"question_id": 5, "text": ""}), questions)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is empty; expected records"),
        ("[]", "is empty; expected records"),
        ('[{"image_id": 1', r"r.json is not JSON \(.*\); expected a list of records"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id', r"line 2 is not JSON \(.*\); expected one record"),
        ("[1]", "entry 1 is 1; expected a record"),
        ("3", "r.json is 3; expected a list of records"),
        ('[{"caption": "a"}]', r"""entry 1 has \["caption"\]; expected 'image_id' or 'image'"""),
        ('[{"image_id": 1, "said": "a"}]', "expected 'caption' or 'text' or 'answer' or 'response'"),
        ('[{"image_id": 1, "caption": null}]', "is null; expected a string"),
        ('[{"image_id": true, "caption": ""}]', "is true; expected a number or a name"),
        ('[{"image_id": 1, "caption": ""}, {"image_id": "1", "caption": ""}]', "entry 2: duplicate image and question"),
    ],
)
def test_read_responses_refuses_bad_files(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_responses(tmp_path / "r.json")


def test_read_responses_refuses_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_responses(tmp_path / "none.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"r.json is in UTF-16"):
        read_responses(tmp_path / "r.json")


def test_read_truth(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "t.jsonl", {"image": "1.jpg", "objects": ["men", "Puppy", "dog"]}, {"image": 2, "objects": []}
    )
    assert chair.read_truth(file, COCO) == {"1.jpg": {"person", "dog"}, "2": frozenset()}


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([], "is empty; expected records"),
        ([{"image": "a", "objects": ["unicorn"]}], "a: objects: 'unicorn' is not a word of the vocabulary"),
        ([{"image": "a", "objects": "dog"}], 'objects is "dog"; expected a list of names'),
        ([{"image": "a"}], r"""line 1 has \["image"\]; expected 'objects'"""),
        ([{"image": "a", "objects": []}, {"image": "a", "objects": []}], "line 2: duplicate image a"),
        ([{"image": 1, "objects": []}, {"image": "01", "objects": []}], "duplicate image 01, as 1"),
    ],
)
def test_read_truth_refuses_bad_files(records: list[Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        chair.read_truth(write_jsonl(tmp_path / "t.jsonl", *records), COCO)


def coco_files(folder: Path) -> tuple[Path, Path]:
    """Image 1 has the mask of a dog and a caption with a man, image 2 a mask alone, image 3 nothing."""
    instances = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 67, "name": "dining table"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18},
            {"image_id": 2, "category_id": 67},
        ],
    }
    captions = {
        "images": [{"id": 1}, {"id": 3}],
        "annotations": [{"image_id": 1, "caption": "A man plays."}, {"image_id": 3, "caption": "Fog."}],
    }
    return write_jsonl(folder / "instances.json", instances), write_jsonl(folder / "captions.json", captions)


def test_read_coco(tmp_path: Path) -> None:
    instances, captions = coco_files(tmp_path)
    truth = chair.read_coco([instances], [captions], COCO)
    assert truth == {"1": {"dog", "person"}, "2": {"dining table"}, "3": frozenset()}
    assert chair.read_coco([instances], [captions], COCO, images={"1"}) == {"1": {"dog", "person"}}
    assert chair.read_coco([instances], [], COCO)["1"] == {"dog"}


def test_read_coco_refuses_bad_files(tmp_path: Path) -> None:
    instances, captions = coco_files(tmp_path)
    with pytest.raises(ValueError, match=r"captions.json: categories is null; expected a list of records"):
        chair.read_coco([captions], [], COCO)
    content = json.loads(instances.read_text())
    content["annotations"][1]["category_id"] = 5
    with pytest.raises(ValueError, match="annotations 2: category_id is 5; expected one of `categories`"):
        chair.read_coco([write_jsonl(instances, content)], [captions], COCO)
    content["categories"][0]["name"] = "unicorn"
    with pytest.raises(ValueError, match="'unicorn' is not a word of the vocabulary"):
        chair.read_coco([write_jsonl(instances, content)], [captions], COCO)
    with pytest.raises(ValueError, match="expected one dictionary"):
        chair.read_coco([write_jsonl(instances, [1])], [captions], COCO)


def test_category_that_is_no_object_is_named_with_its_place(tmp_path: Path) -> None:
    content = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "unicorn"}], "annotations": []}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: categories 1: 'unicorn' is not a word"):
        chair.read_coco([tmp_path / "instances.json"], [], coco_vocabulary("refined"))


def test_ids_of_questions_may_be_digits(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "image": "1.jpg"}')
    (tmp_path / "a.jsonl").write_text('{"question_id": "1", "text": "A dog."}')
    (response,) = read_responses(tmp_path / "a.jsonl", tmp_path / "q.jsonl")
    assert response.text == "A dog."
