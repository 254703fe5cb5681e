"""What the evaluation of vision-language models is told before it costs anything, and what it survives."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Folders, data_files, recipes
from tests.helpers.commands import Commands, Content, contains

DECODING = {"max_new_tokens": 4}
QUESTION = {"question_id": 1, "image": "0.png", "text": "Is there a dog?", "label": "yes"}


@pytest.fixture
def content(vlm_folders: Folders, tmp_path: Path) -> Content:
    rows = data_files.response_pairs(tmp_path / "rows")
    evaluate = {"benchmark": "crowds", "num_images": 3, "decoding": DECODING}
    return recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", train={"steps": 1}, evaluate=evaluate)


@pytest.fixture
def trained(content: Content, mmalign: Commands) -> Content:
    mmalign("train", content)
    return content


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Images with questions, annotations and answers, and broken ones of each."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(data_files.png(number))
    asked = [{**QUESTION, "question_id": n + 1, "image": f"{n}.png"} for n in range(3)]
    responses = [{"question_id": n + 1, "image": f"{n}.png", "text": "Yes"} for n in range(3)]
    lines = {
        "questions": asked,
        "answers": responses,
        "renamed": [{"question_id": 1, "picture": "0.png", "text": "What?"}],
        "maybe": [{**QUESTION, "label": "maybe"}],
        "absent": [{**QUESTION, "image": "gone.png"}],
        "fewer": responses[:2],
        "silent": [{**one, "text": ""} for one in responses],
        "objects": [{"image": f"{n}.png", "objects": ["dog"]} for n in range(3)],
        "unknown": [{"image": "0.png", "objects": ["unicorn"]}],
        "elsewhere": [{"image": "9.png", "objects": ["dog"]}],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "empty.jsonl").touch()
    (folder / "cut.jsonl").write_text('{"question_id": 1, "ima')
    return folder


def pope(**more: Any) -> Content:
    return {"benchmark": "pope", "questions": {"random": "F/questions.jsonl"}, "images": "F", **more}


def chair(**more: Any) -> Content:
    return {"benchmark": "chair", "annotations": "F/objects.jsonl", "images": "F", **more}


def filled(evaluate: Content, folder: Path) -> Content:
    results: Content = json.loads(
        json.dumps(evaluate).replace("F/", f"{folder}/").replace('"F"', json.dumps(str(folder)))
    )
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        (pope(questions={"random": "F/none.jsonl"}), "evaluate.questions: there is no file or folder 'F/none.jsonl'"),
        (pope(questions={"random": "F/empty.jsonl"}), "evaluate: F/empty.jsonl is empty; expected POPE's questions"),
        (pope(questions={"random": "F/cut.jsonl"}), "evaluate: cut.jsonl: line 1 is not JSON"),
        (pope(questions={"random": "F/maybe.jsonl"}), 'label is "maybe"; expected "yes" or "no"'),
        (pope(questions={"random": "F/renamed.jsonl"}), "expected 'label'"),
        (
            pope(questions={"random": "F/absent.jsonl"}),
            "evaluate: images: F has no gone.png (1 of 1 images are missing)",
        ),
        (pope(images="F/none"), "evaluate.images: F/none is not a folder; expected the folder of the images"),
        (chair(annotations="F/none.jsonl"), "evaluate.annotations: there is no file or folder 'F/none.jsonl'"),
        (chair(annotations="F/unknown.jsonl"), "'unicorn' is not a word of the vocabulary"),
        (chair(annotations="F/elsewhere.jsonl", questions="F/questions.jsonl"), "3 of 3 images have no annotation"),
        (chair(questions="F/renamed.jsonl"), "expected 'image'"),
        (chair(vocabulary="F/none.json"), "evaluate: vocabulary: F/none.json cannot be read"),
        (
            chair(annotations={"instances": ["F/none.json"]}),
            "evaluate.annotations.instances: there is no file or folder 'F/none.json'",
        ),
        (
            chair(annotations={"instances": ["F/objects.jsonl"]}),
            "evaluate: questions: MSCOCO's annotations do not say which images to ask about; add a file of questions",
        ),
        ({"benchmark": "amber", "annotations": "F", "images": "F"}, "evaluate: there is no file or folder"),
        ({"benchmark": "implicit"}, "evaluate: implicit needs a validation split; set data.validation_fraction"),
    ],
)
def test_bad_files_are_told_before_the_model_is_loaded(
    evaluate: Content,
    sentence: str,
    trained: Content,
    files: Path,
    mmalign: Commands,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("no_model")  # from here on
    message = mmalign.refused("evaluate", {**trained, "evaluate": filled(evaluate, files)})
    contains(message, sentence.replace("F/", f"{files}/").replace("images: F ", f"images: {files} "))
    assert not (Path(trained["output"]) / "evaluation").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        ({"benchmark": "pop"}, "got the text 'pop'; did you mean 'pope'?"),
        ({"benchmark": "pope", "images": "F"}, "evaluate: benchmark pope needs questions, or annotations"),
        ({"benchmark": "chair", "images": "F"}, "evaluate: benchmark chair needs the objects of the images"),
        ({"benchmark": "chair", "annotations": "a"}, "evaluate: images: expected the folder of the images"),
        ({"benchmark": "crowds", "images": "F"}, "evaluate: benchmark crowds takes no 'images' but"),
        ({"benchmark": "pope", "questions": "q", "images": "F", "vocabulary": "a"}, "takes no 'vocabulary' but"),
        (chair(questions={"random": "q"}), "evaluate: benchmark chair has no splits; expected one file of questions"),
        ({"benchmark": "amber", "annotations": {"instances": ["a"]}, "images": "F"}, "reads its annotations from its"),
        ({"benchmark": "crowds", "num_images": 1}, "evaluate.num_images: expected greater than or equal to 2, got 1"),
        ({"benchmark": "scenes"}, "evaluate.benchmark: expected 'crowds', 'pope'"),
    ],
)
def test_sections_that_do_not_fit(evaluate: Content, sentence: str, content: Content, mmalign: Commands) -> None:
    contains(mmalign.refused("evaluate", {**content, "evaluate": evaluate}), sentence)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        (pope(answers={"after": "F/none.jsonl"}), "evaluate.answers.after: there is no file or folder 'F/none.jsonl'"),
        (pope(answers={"after": "F/empty.jsonl"}), "F/empty.jsonl has 0 answers to 3 questions"),
        (pope(answers={"after": "F/fewer.jsonl"}), "F/fewer.jsonl has no answer to 1 of 3 questions (3)"),
        (
            pope(answers={"after": {"popular": "F/answers.jsonl"}}),
            "evaluate: answers: got files for popular; expected a file for each split: random",
        ),
        (chair(answers={"after": "F/empty.jsonl"}), "F/empty.jsonl is empty; expected records"),
        (chair(answers={"after": {"a": "F/answers.jsonl"}}), "answers: got files for a; expected one file"),
        (
            chair(answers={"after": "F/answers.jsonl", "before": "F/fewer.jsonl"}),
            "evaluate: CHAIR: the two models answered different questions: 1 only after (2.png, ...)",
        ),
        (chair(answers={"before": "F/answers.jsonl"}), "evaluate.answers needs 'after', which is missing"),
    ],
)
def test_bad_files_of_answers(
    evaluate: Content, sentence: str, content: Content, files: Path, mmalign: Commands
) -> None:
    message = mmalign.refused("evaluate", {**content, "evaluate": filled(evaluate, files)})
    contains(message, sentence.replace("F/", f"{files}/"))


@pytest.mark.usefixtures("no_model")
def test_answers_that_are_all_empty_are_answers(content: Content, files: Path, mmalign: Commands) -> None:
    """A model that says nothing invents nothing and finds nothing: recall says so."""
    section = chair(answers={"after": "F/silent.jsonl", "before": "F/answers.jsonl"})
    printed = mmalign("evaluate", {**content, "evaluate": filled(section, files)})
    assert "recall, %" in printed
    message = mmalign.refused("gallery", {**content, "evaluate": filled(section, files)})
    contains(message, "existing answers are scored and not shown")


def test_an_image_that_cannot_be_read_costs_its_questions_alone(
    trained: Content, files: Path, mmalign: Commands
) -> None:
    (files / "1.png").write_bytes((files / "1.png").read_bytes()[:60])
    asked = {**trained, "evaluate": filled(chair(decoding=DECODING), files)}
    printed = mmalign("evaluate", asked)
    assert "\n1 images are skipped for both models: 1.png: is not a readable image" in printed
    result = json.loads((Path(trained["output"]) / "evaluation" / "result.json").read_text())
    assert result["questions"] == 2 and len(result["left out"]) == 1
    mmalign("gallery", asked)


def test_images_of_which_none_can_be_read(trained: Content, files: Path, mmalign: Commands) -> None:
    for number in range(3):
        (files / f"{number}.png").write_bytes(b"")
    message = mmalign.refused("evaluate", {**trained, "evaluate": filled(chair(decoding=DECODING), files)})
    contains(message, "evaluate: no question could be asked (", "0.png: has zero bytes")
    assert not (Path(trained["output"]) / "evaluation").exists()
