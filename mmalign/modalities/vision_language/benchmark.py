"""Files of a benchmark of responses: its questions and their images, and answers that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.config import EvaluateResponses, Files, Recipe
from mmalign.evaluation.annotations import (
    Question,
    image_id,
    match_images,
    read_objects,
    read_questions,
    read_responses,
)
from mmalign.evaluation.benchmarks import amber, chair, crowds, object_halbench, pope
from mmalign.evaluation.benchmarks.base import (
    Benchmark,
    Images,
    amber_benchmark,
    caption_benchmark,
    open_folder,
    yes_no_benchmark,
)
from mmalign.evaluation.metrics import Metrics, MetricsComparison, Table, compare
from mmalign.evaluation.question_files import is_table, read_rows
from mmalign.language.objects import Vocabulary
from mmalign.language.vocabularies import load_vocabulary
from mmalign.language.yes_no import parse_strict
from mmalign.modalities import Result

_CAPTION_SCORES = {"chair": chair.score, "object_halbench": object_halbench.score}


def read_benchmark(section: EvaluateResponses) -> Benchmark:
    """Read a benchmark's questions, and check that all its files exist and match.

    Raises:
        ValueError: a file or an image is missing, or a file is invalid.
    """
    try:
        if section.benchmark == "crowds":
            return crowds.benchmark(section.num_images, section.split, section.seed)
        # Yes-no questions, then AMBER, then captions scored by their objects
        if section.benchmark == "pope":
            by_split = {
                split: [_with_suffix(question, section) for question in asked]
                for split, asked in _pope_questions(section).items()
            }
            images = _open_images(section, [question for asked in by_split.values() for question in asked])
            return yes_no_benchmark(by_split, images, _parser(section))
        if section.benchmark == "amber":
            assert isinstance(section.annotations, str)
            annotations = amber.read_amber(section.annotations)
            questions = [
                _with_suffix(question, section) if annotations.is_yes_no(question.id) else question
                for question in read_questions(Path(section.annotations) / "query" / "query_all.json", section.prompt)
            ]
            return amber_benchmark(questions, annotations, _open_images(section, questions), _parser(section))
        questions = read_questions(_question_file(section), section.prompt)
        words = load_vocabulary("vocabulary", section.vocabulary)
        objects = _objects(section, words, [question.image for question in questions])
        images = _open_images(section, questions)
        return caption_benchmark(questions, objects, words, images, _CAPTION_SCORES[section.benchmark])
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error


def score_files(recipe: Recipe) -> Result | None:
    """Score the files of answers that a section names, of both models or of one; return None without such files.

    No model and no image is loaded.

    Raises:
        ValueError: a file is missing or invalid, or does not answer the questions.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    files = section.answers
    if files is None:
        return None
    score = {"pope": _score_pope, "amber": _score_amber}.get(section.benchmark, _score_captions)
    try:
        after = score(section, files.after)
        measures, table = report(after if files.before is None else compare_all(score(section, files.before), after))
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    return {"benchmark": section.benchmark, "answers": files.model_dump(), "measures": measures}, table


def _parser(section: EvaluateResponses) -> pope.Parse:
    """Return the parser of yes and no; the default is the release's for POPE, and the strict one for AMBER."""
    if section.parse == "strict" or (section.parse == "auto" and section.benchmark == "amber"):
        return parse_strict
    return amber.parse_published if section.benchmark == "amber" else pope.parse_published


def _pope_questions(section: EvaluateResponses) -> dict[str, list[Question]]:
    """Return the questions of each split, read from files or built from annotations."""
    if section.questions is not None:
        labels = pope.read_labels(_paths(section.labels)) if section.labels is not None else None
        files = {"": section.questions} if isinstance(section.questions, str) else section.questions
        return pope.read_splits(files, labels)
    assert isinstance(section.annotations, str)
    objects = read_objects(section.annotations)
    return {split: pope.build(objects, split, seed=section.seed) for split in pope.SPLITS}


def _paths(files: Files) -> list[str]:
    return [files] if isinstance(files, str) else list(files.values())


def _with_suffix(question: Question, section: EvaluateResponses) -> Question:
    """Return the question with the section's suffix on a line of its own, unless it ends in it already."""
    if not section.suffix or question.text.endswith(section.suffix):
        return question
    return replace(question, text=f"{question.text}\n{section.suffix}")


def _open_images(section: EvaluateResponses, questions: Sequence[Question]) -> Images:
    """Return the images of questions: those of a folder, or those inside the files of questions."""
    if section.images is not None:
        return open_folder(section.images, questions)
    sources = [read_rows(path)[1] for path in _paths(section.questions or "") if is_table(path)]
    by_name = {name: source for source in sources if source is not None for name in source}
    return lambda name: by_name[name](name)


def _question_file(section: EvaluateResponses) -> str:
    """Return the file of questions, or else the annotations, whose records also name images."""
    file = section.questions or section.annotations
    if not isinstance(file, str):
        raise ValueError(
            "questions: MSCOCO's annotations do not say which images to ask about; add a file of questions"
        )
    return file


def _objects(section: EvaluateResponses, words: Vocabulary, images: Sequence[str]) -> chair.Truth:
    """Return the objects of these images."""
    annotations = section.annotations
    if isinstance(annotations, str):
        return chair.read_truth(annotations, words)
    assert annotations is not None
    return chair.read_coco(annotations.instances, annotations.captions, words, {image_id(image) for image in images})


def _score_pope(section: EvaluateResponses, files: Files) -> list[Metrics]:
    questions = _pope_questions(section)
    # One file for all splits, one after another
    if isinstance(files, str) and len(questions) > 1:
        return [pope.score(questions, _answers_of_all(files, questions), _parser(section))]
    by_split = {next(iter(questions)): files} if isinstance(files, str) else files
    if set(by_split) != set(questions):
        raise ValueError(
            f"answers: got files for {', '.join(by_split)}; expected a file for each split: {', '.join(questions)}"
        )
    answers = {split: pope.read_answers(by_split[split], asked) for split, asked in questions.items()}
    return [pope.score(questions, answers, _parser(section))]


def _answers_of_all(file: str, questions: Mapping[str, Sequence[Question]]) -> dict[str, list[str]]:
    """Return the answers to each split's questions from one file."""
    answers = iter(pope.read_answers(file, [question for asked in questions.values() for question in asked]))
    return {split: [next(answers) for _ in asked] for split, asked in questions.items()}


def _score_amber(section: EvaluateResponses, files: Files) -> list[Metrics]:
    assert isinstance(section.annotations, str)
    paths = _paths(files)
    responses: dict[int, str] = {}
    for path in paths:
        file_responses = amber.read_responses(path)
        if responses.keys() & file_responses:
            raise ValueError(f"answers: {', '.join(paths)} answer some questions twice; expected one answer to each")
        responses |= file_responses
    return amber.score(responses, amber.read_amber(section.annotations), _parser(section))


def _score_captions(section: EvaluateResponses, files: Files) -> list[Metrics]:
    if not isinstance(files, str):
        raise ValueError(f"answers: got files for {', '.join(files)}; expected one file, since there are no splits")
    assert section.questions is None or isinstance(section.questions, str)
    responses, words = read_responses(files, section.questions), load_vocabulary("vocabulary", section.vocabulary)
    objects = _objects(section, words, [response.image for response in responses])
    # Images by the names that the truth has
    ids = match_images([response.image for response in responses], objects)
    responses = [replace(response, image=image) for response, image in zip(responses, ids, strict=True)]
    return [_CAPTION_SCORES[section.benchmark](responses, objects, words)]


def compare_all(before: Sequence[Metrics], after: Sequence[Metrics]) -> list[MetricsComparison]:
    """Compare the metrics of two models, benchmark by benchmark."""
    return [compare(*pair) for pair in zip(before, after, strict=True)]


def report(results: Sequence[Metrics | MetricsComparison]) -> tuple[dict[str, Any], Table]:
    """Return the numbers of all metrics for result.json, by benchmark, and one table with all of them."""
    numbers = [result.as_dict() for result in results]
    return {str(entry["benchmark"]): entry for entry in numbers}, [row for result in results for row in result.table()]
