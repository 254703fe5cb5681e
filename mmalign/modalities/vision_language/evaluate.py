"""Evaluation of a base and a trained vision-language model on the same questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign import atomic_io
from mmalign.config import EvaluateResponses, Files, Recipe, ResponseModel
from mmalign.data.caches import fingerprint
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.data_module import Splits
from mmalign.data.formats.files import records
from mmalign.data.pairs import format_rows
from mmalign.evaluation.annotations import (
    Question,
    image_id,
    read_objects,
    read_questions,
    read_responses,
    take_number,
    take_text,
)
from mmalign.evaluation.benchmarks import amber, chair, crowds, implicit_reward, object_halbench, pope
from mmalign.evaluation.benchmarks.base import (
    AnswersByPart,
    Benchmark,
    amber_benchmark,
    caption_benchmark,
    open_folder,
    yes_no_benchmark,
)
from mmalign.evaluation.generate_answers import Answers, generate_answers
from mmalign.evaluation.metrics import SIDES, Metrics, MetricsComparison, Table, compare
from mmalign.evaluation.yes_no import final_answer, parse_strict
from mmalign.families.base import VisionLanguage
from mmalign.language.objects import Vocabulary
from mmalign.language.vocabularies import load_vocabulary
from mmalign.modalities import EVALUATE_AGAIN, Measure, Result
from mmalign.modalities.validation import implicit_reward_benchmark
from mmalign.policy import Policy

logger = logging.getLogger(__name__)

_CAPTION_SCORES = {"chair": chair.score, "object_halbench": object_halbench.score}


def read_benchmark(section: EvaluateResponses) -> Benchmark:
    """Read a benchmark's questions, and check that all its files exist and match.

    Raises:
        ValueError: a file or an image is missing, or a file is invalid.
    """
    try:
        if section.benchmark == "crowds":
            return crowds.benchmark(section.num_images, section.split, section.seed)
        assert section.images is not None, "the section requires it"
        # Yes-no questions, then AMBER, then captions scored by their objects
        if section.benchmark == "pope":
            by_split = _pope_questions(section)
            images = open_folder(section.images, [question for asked in by_split.values() for question in asked])
            return yes_no_benchmark(by_split, images, _parser(section))
        if section.benchmark == "amber":
            assert isinstance(section.annotations, str)
            questions = read_questions(Path(section.annotations) / "query" / "query_all.json", section.prompt)
            images = open_folder(section.images, questions)
            return amber_benchmark(questions, amber.read_amber(section.annotations), images, _parser(section))
        questions = read_questions(_question_file(section), section.prompt)
        words = load_vocabulary("vocabulary", section.vocabulary)
        objects = _objects(section, words, [question.image for question in questions])
        images = open_folder(section.images, questions)
        return caption_benchmark(questions, objects, words, images, _CAPTION_SCORES[section.benchmark])
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error


def open_benchmark(recipe: Recipe, _: torch.device, splits: Splits | None) -> Measure:
    """Read the benchmark's questions; return the measure of a policy, for `implicit` on the validation split.

    Raises:
        ValueError: a file or an image is missing, or a file is invalid.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    if section.benchmark == "implicit":
        assert splits is not None
        return implicit_reward_benchmark(recipe, splits, implicit_reward.response_scores)
    return partial(compare_answers, recipe, read_benchmark(section))


def compare_answers(
    recipe: Recipe,
    benchmark: Benchmark,
    policy: Policy[VisionLanguage],
    folder: Path,
    identity: Mapping[str, Any],
) -> Result:
    """Score base and trained model on the benchmark's questions.

    Args:
        recipe: the recipe, with a section `evaluate`.
        benchmark: the questions, their images and the score.
        policy: the trained model, with the base model as reference.
        folder: folder for the answers and the gallery's `samples.json`.
        identity: identity of this evaluation, stored in `samples.json`.

    Returns:
        The content of `result.json`, and a table of it.

    Raises:
        ValueError: no question can be asked.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    # Answers of both models, without the images that cannot be read
    answers = _ask(recipe, section, policy, benchmark, identity)
    left_out = list(answers.skipped.values())
    if left_out:
        logger.warning(f"{len(left_out)} images are skipped for both models: {format_rows(left_out)}")
    benchmark = benchmark.without_images(answers.skipped)
    if not benchmark.questions:
        raise ValueError(f"evaluate: no question could be asked ({format_rows(left_out)})")

    by_side: dict[str, AnswersByPart] = {
        side: {
            part: [final_answer(texts[item.question.image, item.question.text]) for item in items]
            for part, items in benchmark.parts.items()
        }
        for side, texts in zip(SIDES, (answers.before, answers.after), strict=True)
    }
    num_empty = {side: sum(not text for texts in parts.values() for text in texts) for side, parts in by_side.items()}
    for side, number in num_empty.items():
        if number:
            logger.warning(
                f"{number:,} answers {side} alignment are empty; check the model's chat template; a model that thinks "
                "first needs a larger evaluate.decoding.max_new_tokens"
            )

    num_cut = dict(zip(SIDES, answers.num_cut, strict=True))
    for side, number in num_cut.items():
        if number:
            logger.warning(
                f"{number:,} answers {side} alignment are cut at evaluate.decoding.max_new_tokens = "
                f"{section.decoding.max_new_tokens}"
            )

    # Metrics and files
    comparisons = _compare(*map(benchmark.score, by_side.values()))
    for side, parts in by_side.items():
        _write_answers(folder / side, benchmark, parts)
    content = {
        "of": identity,
        "score": benchmark.score_name,
        "table": _headline_table(comparisons),
        "samples": _samples(benchmark, by_side),
    }
    (folder / "samples.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    result = {
        "benchmark": section.benchmark,
        "model": recipe.model.path,
        "method": recipe.method.name,
        "questions": len(benchmark.questions),
        "left out": list(map(str, left_out)),
        "empty answers": num_empty,
        "cut answers": num_cut,
    }
    measures, table = _report(comparisons)
    return {**result, "measures": measures}, table


def _ask(
    recipe: Recipe,
    section: EvaluateResponses,
    policy: Policy[VisionLanguage],
    benchmark: Benchmark,
    identity: Mapping[str, Any],
) -> Answers:
    """Return both models' answers to all questions, cached or generated."""
    assert isinstance(recipe.model, ResponseModel)
    folder = Path(recipe.output) / "answers" if section.cache == "auto" else Path(section.cache)
    atomic_io.make_folder("evaluate.cache", folder)
    settings = {
        "decoding": section.decoding.model_dump(exclude={"batch_size"}),
        "precision": recipe.train.precision,
        "seed": section.seed,
        "images": section.images or section.benchmark,
        "template_arguments": recipe.model.template_arguments,
    }
    models = identity["trained"]["identity"]["model"], fingerprint.fingerprint_weights(policy.unwrapped)
    before, after = (AnswerCache(folder, {**settings, "model": model}) for model in models)
    return generate_answers(
        policy,
        [(question.image, question.text) for question in benchmark.questions],
        benchmark.images,
        section.decoding,
        seed=section.seed,
        caches=(before, after),
    )


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
        measures, table = _report(after if files.before is None else _compare(score(section, files.before), after))
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    return {"benchmark": section.benchmark, "answers": files.model_dump(), "measures": measures}, table


def read_metrics(recipe: Recipe) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of an evaluated run, before and after alignment, from the answers that it wrote."""
    assert isinstance(recipe.evaluate, EvaluateResponses)
    benchmark, folder = read_benchmark(recipe.evaluate), Path(recipe.output) / "evaluation"
    written = {
        (side, part): _read_answers(folder / side / f"{part}.jsonl")
        for side in SIDES
        for part, items in benchmark.parts.items()
        if items
    }
    benchmark = benchmark.without_images(
        {
            item.question.image
            for part, items in benchmark.parts.items()
            for item in items
            if item.question.id not in written[SIDES[0], part]
        }
    )

    def answer(side: str, part: str, number: int) -> str:
        if number not in written[side, part]:
            raise ValueError(f"{folder / side / part}.jsonl: has no answer to question {number}; {EVALUATE_AGAIN}")
        return written[side, part][number]

    before, after = (
        benchmark.score(
            {part: [answer(side, part, item.question.id) for item in items] for part, items in benchmark.parts.items()}
        )
        for side in SIDES
    )
    return before, after


def _read_answers(file: Path) -> dict[int, str]:
    """Read the answers that `_write_answers` wrote, by question."""
    return {take_number(at, record, "question_id"): take_text(at, record, "text") for at, record in records(file)}


# ---------------------------------------------------------------------------------------------------------- input files


def _parser(section: EvaluateResponses) -> pope.Parse:
    """Return the parser of yes and no; the default is the release's for POPE, and the strict one for AMBER."""
    if section.parse == "strict" or (section.parse is None and section.benchmark == "amber"):
        return parse_strict
    return amber.parse_published if section.benchmark == "amber" else pope.parse_published


def _pope_questions(section: EvaluateResponses) -> dict[str, list[Question]]:
    """Return the questions of each split, read from files or built from annotations."""
    if isinstance(section.questions, str):
        return {Path(section.questions).stem: pope.read_questions(section.questions)}
    if section.questions is not None:
        return {split: pope.read_questions(file) for split, file in section.questions.items()}
    assert isinstance(section.annotations, str)
    objects = read_objects(section.annotations)
    return {split: pope.build(objects, split, seed=section.seed) for split in pope.SPLITS}


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
    by_split = {next(iter(questions)): files} if isinstance(files, str) else files
    if set(by_split) != set(questions):
        raise ValueError(
            f"answers: got files for {', '.join(by_split)}; expected a file for each split: {', '.join(questions)}"
        )
    answers = {split: pope.read_answers(by_split[split], asked) for split, asked in questions.items()}
    return [pope.score(questions, answers, _parser(section))]


def _score_amber(section: EvaluateResponses, files: Files) -> list[Metrics]:
    assert isinstance(section.annotations, str)
    paths = [files] if isinstance(files, str) else list(files.values())
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
    return [_CAPTION_SCORES[section.benchmark](responses, objects, words)]


# --------------------------------------------------------------------------------------------------------- output files


def _compare(before: Sequence[Metrics], after: Sequence[Metrics]) -> list[MetricsComparison]:
    return [compare(*pair) for pair in zip(before, after, strict=True)]


def _report(results: Sequence[Metrics | MetricsComparison]) -> tuple[dict[str, Any], Table]:
    """Return the numbers of all metrics for result.json, by benchmark, and one table with all of them."""
    numbers = [result.as_dict() for result in results]
    return {str(entry["benchmark"]): entry for entry in numbers}, [row for result in results for row in result.table()]


def _headline_table(comparisons: Sequence[MetricsComparison]) -> Table:
    rows = [row for comparison in comparisons for row in comparison.table(short=True)[1:]]
    return [("", "before", "after", "change [95 % interval]"), *rows]


def _write_answers(folder: Path, benchmark: Benchmark, answers: AnswersByPart) -> None:
    """Write a file of answers for each part, in the format that `evaluate.answers` reads."""
    folder.mkdir()
    for part, items in benchmark.parts.items():
        lines = [
            {
                "question_id": item.question.id,
                "image": item.question.image,
                "question": item.question.text,
                "text": text,
            }
            for item, text in zip(items, answers[part], strict=True)
        ]
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def _samples(benchmark: Benchmark, by_side: Mapping[str, AnswersByPart]) -> list[dict[str, Any]]:
    """Return every question with its ground truth, and both answers with their ratings."""
    return [
        {
            "part": part,
            "image": item.question.image,
            "question": item.question.text,
            "truth": item.truth,
            **{side: asdict(item.rate(answers[part][index])) for side, answers in by_side.items()},
        }
        for part, items in benchmark.parts.items()
        for index, item in enumerate(items)
    ]
