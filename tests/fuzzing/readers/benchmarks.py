"""Files of CHAIR, POPE, AMBER and MSCOCO: questions, annotations, vocabularies and answers, with their scores."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mmalign.evaluation.annotations import read_objects, read_questions, read_responses
from mmalign.evaluation.benchmarks import amber, chair, pope
from mmalign.evaluation.benchmarks.base import open_folder
from mmalign.language.objects import coco_vocabulary
from mmalign.language.vocabularies import load_vocabulary
from mmalign.language.yes_no import parse_strict
from tests.fuzzing.mutations import VALUES
from tests.fuzzing.readers.rows import IMAGES, in_lines
from tests.fuzzing.rule import Files, Reader

ASKED = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"},
    {"question_id": 2, "image": "b.png", "text": "Is there a cat?", "label": "no"},
]
BY_ID = [{"question_id": 2, "text": "No."}, {"question_id": 1, "answer": "Yes"}]
IN_ORDER = [{"question": one["text"], "answer": "yes"} for one in ASKED]
OBJECTS = [
    {"image": "a.png", "objects": ["dog", "cat", "car"]},
    {"image": "COCO_val2014_000000000042.jpg", "objects": []},
]
COCO: dict[str, Any] = {
    "images": [{"id": 42}, {"id": "7"}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [{"image_id": 42, "category_id": 1}, {"image_id": 7, "category_id": 2}],
}
CAPTIONS = {"images": COCO["images"], "annotations": [{"image_id": 42, "caption": "A dog with a cat."}]}
SAID = [{"image_id": 42, "caption": "A dog runs."}, {"image": "7", "text": "Assistant: A cat.", "question": "What?"}]
KARPATHY = {"imgToEval": {str(one): {"image_id": one, "caption": "A dog."} for one in (7, 42)}}
ANNOTATED = [
    {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
    {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 3, "type": "generative", "truth": ["cat"], "hallu": []},
    {"id": 4, "type": "relation", "truth": "no"},
]
AMBER = {
    "annotations.json": json.dumps(ANNOTATED).encode(),
    "relation.json": b'{"dog": ["puppy"], "cat": []}',
    "safe_words.txt": b"sign\nlight\n",
    "query/query_all.json": b'[{"id": 1, "image": "a.png", "query": "Say."}, {"id": 2, "image": "b.png"}]',
    "answers.json": b'[{"id": 1, "response": "A dog and a cat."}, {"id": 2, "response": "Yes"}, '
    b'{"question_id": 3, "text": "A cat."}, {"id": 4, "answer": "Yes"}]',
}


def existing(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def read_pope(folder: Path) -> None:
    questions = pope.read_splits({"random": folder / "questions.jsonl"})["random"]
    answers = pope.read_answers(folder / "answers.jsonl", questions)
    pope.score({"random": questions}, {"random": answers}, parse_strict).as_dict()
    read_questions(folder / "questions.jsonl", "Say.")
    images = open_folder(folder, questions)
    for question in questions:
        images(question.image)


def read_objects_and_build(folder: Path) -> None:
    objects = read_objects(folder / "objects.json")
    chair.read_truth(folder / "objects.json", coco_vocabulary("refined"))
    for split in pope.SPLITS:
        pope.build(objects, split, objects_per_image=1, names=["dog", "cat", "car", "bus"])


def read_chair(folder: Path) -> None:
    words = coco_vocabulary("refined")
    truth = chair.read_coco([folder / "instances.json"], [folder / "captions.json"], words)
    chair.score(read_responses(folder / "answers.json"), truth, words).as_dict()


def read_amber(folder: Path) -> None:
    annotations = amber.read_amber(folder)
    for metrics in amber.score(amber.read_responses(folder / "answers.json"), annotations):
        metrics.as_dict()


def chair_files(answers: object) -> Files:
    content = {"instances.json": COCO, "captions.json": CAPTIONS, "answers.json": answers}
    return {name: json.dumps(value).encode() for name, value in content.items()}


def pope_files(answers: list[Any]) -> Files:
    return {"questions.jsonl": in_lines(ASKED), "answers.jsonl": in_lines(answers), **IMAGES}


RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["question_id", "text", "answer", "question", "id"]), VALUES), max_size=3
)

READERS = (
    Reader(
        "POPE",
        read_pope,
        (pope_files(BY_ID), pope_files(IN_ORDER)),
        share=60,
        places=("images:", "pope:", "an interval needs two"),
        generated=RECORDS.map(pope_files),
    ),
    Reader(
        "objects of images",
        read_objects_and_build,
        ({"objects.json": json.dumps(OBJECTS).encode()},),
        share=40,
        places=("pope:",),
    ),
    Reader(
        "CHAIR and MSCOCO",
        read_chair,
        (chair_files(SAID), chair_files(KARPATHY)),
        share=60,
        places=("truth:", "an interval needs two"),
        generated=RECORDS.map(chair_files),
    ),
    Reader("AMBER", read_amber, (AMBER,), share=60, places=("amber:", "an interval needs two")),
    Reader(
        "vocabularies",
        lambda folder: load_vocabulary("evaluate.vocabulary", str(folder / "words.json")),
        ({"words.json": b'{"dog": ["puppy"], "cat": []}'},),
        share=20,
        generated=VALUES.map(lambda value: {"words.json": json.dumps(value).encode()}),
    ),
)
