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
from mmalign.config import EvaluateResponses, Recipe, ResponseModel
from mmalign.data.caches import fingerprint
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.data_module import Splits
from mmalign.data.formats.files import records
from mmalign.data.pairs import format_rows
from mmalign.evaluation.annotations import take_question_id, take_text
from mmalign.evaluation.benchmarks import implicit_reward
from mmalign.evaluation.benchmarks.base import AnswersByPart, Benchmark
from mmalign.evaluation.generate_answers import Answers, generate_answers
from mmalign.evaluation.metrics import SIDES, Metrics, MetricsComparison, Table
from mmalign.evaluation.yes_no import final_answer
from mmalign.families.base import VisionLanguage
from mmalign.modalities import EVALUATE_AGAIN, Measure, Result
from mmalign.modalities.validation import implicit_reward_benchmark
from mmalign.modalities.vision_language.benchmark import compare_all, read_benchmark, report
from mmalign.policy import Policy
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)


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
    num_cut = dict(zip(SIDES, answers.num_cut, strict=True))
    _warn_of_bad_answers(num_empty, num_cut, section.decoding.max_new_tokens)

    # Metrics and files
    comparisons = compare_all(*map(benchmark.score, by_side.values()))
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
    measures, table = report(comparisons)
    return {**result, "measures": measures}, table


def _warn_of_bad_answers(num_empty: Mapping[str, int], num_cut: Mapping[str, int], max_new_tokens: int) -> None:
    """Warn of each side's empty answers, and of those that the limit cut."""
    for side, number in num_empty.items():
        if number:
            logger.warning(
                f"{number:,} answers {side} alignment are empty; check the model's chat template; a model that thinks "
                "first needs a larger evaluate.decoding.max_new_tokens"
            )
    for side, number in num_cut.items():
        if number:
            logger.warning(
                f"{number:,} answers {side} alignment are cut at evaluate.decoding.max_new_tokens = {max_new_tokens}"
            )


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
        "images": section.images or section.questions or section.benchmark,
        "template_arguments": recipe.model.template_arguments,
    }
    models = identity["trained"]["identity"]["model"], fingerprint.fingerprint_weights(policy.unwrapped)
    processes = current_processes()
    before, after = (AnswerCache(folder, {**settings, "model": model}, is_writer=processes.is_main) for model in models)
    processes.gather(None)  # nobody writes before all have read
    return generate_answers(
        policy,
        [(question.image, question.text) for question in benchmark.questions],
        benchmark.images,
        section.decoding,
        seed=section.seed,
        caches=(before, after),
    )


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

    def answer(side: str, part: str, number: int | str) -> str:
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


def _read_answers(file: Path) -> dict[int | str, str]:
    """Read the answers that `_write_answers` wrote, by question."""
    return {take_question_id(at, record): take_text(at, record, "text") for at, record in records(file)}


# --------------------------------------------------------------------------------------------------------- output files


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
