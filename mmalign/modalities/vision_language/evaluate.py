"""Evaluation of a base and a trained vision-language model on the same questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mmalign import atomic_io
from mmalign.config import DecodingConfig, EvaluateResponses, Recipe, Rewards
from mmalign.config.evaluation import Combine
from mmalign.data.caches import fingerprint
from mmalign.data.caches.answers import AnswerCache
from mmalign.data.caches.image_features import tokenizer_dependencies
from mmalign.data.data_module import Splits
from mmalign.data.formats.files import records
from mmalign.data.pairs import format_rows
from mmalign.evaluation import best_of
from mmalign.evaluation.annotations import take_question_id, take_text
from mmalign.evaluation.benchmarks import implicit_reward, preference
from mmalign.evaluation.benchmarks.base import AnswersByPart, Benchmark
from mmalign.evaluation.generate_answers import Answers, AnswersByQuestion, generate_answers
from mmalign.evaluation.metrics import SIDES, Metrics, MetricsComparison, Table
from mmalign.families.base import VisionLanguage
from mmalign.language.yes_no import final_answer
from mmalign.modalities import EVALUATE_AGAIN, Measure, Result, loading
from mmalign.modalities.validation import implicit_reward_benchmark
from mmalign.modalities.vision_language.benchmark import compare_all, read_benchmark, report
from mmalign.policy import Policy
from mmalign.rewards import ResponseJudge
from mmalign.training.processes import current_processes

logger = logging.getLogger(__name__)

T = TypeVar("T")
ScoresByPart = Mapping[str, Sequence[float]]  # a judge's scores of the answers to each part's items


class Judges(NamedTuple):
    """Judges of an evaluation: the one that measures, and the one that chooses the best of n answers."""

    measure: ResponseJudge | None
    choose: ResponseJudge | None


def open_benchmark(recipe: Recipe, device: torch.device, splits: Splits | None) -> Measure:
    """Read the questions and load the judges; return the measure of a policy, for `implicit` on the validation split.

    Raises:
        ValueError: a file or an image is missing, a file is invalid, or a judge cannot be loaded.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    if section.benchmark == "implicit":
        assert splits is not None
        return implicit_reward_benchmark(recipe, splits, implicit_reward.response_scores)
    benchmark, scores = read_benchmark(section), _folder(recipe, section) / "scores"

    # Both judges store their scores beside the answers
    def load(reward: Rewards, combine: Combine) -> ResponseJudge:
        allow_pickle = recipe.allow_pickle
        return loading.build_response_judge(reward, device, allow_pickle=allow_pickle, combine=combine, scores=scores)

    measure = load(section.reward, section.combine) if section.reward is not None else None
    choose = load(section.best_of.reward, section.best_of.combine) if section.best_of is not None else None
    return partial(compare_answers, recipe, benchmark, Judges(measure, choose))


def compare_answers(
    recipe: Recipe,
    benchmark: Benchmark,
    judges: Judges,
    policy: Policy[VisionLanguage],
    folder: Path,
    identity: Mapping[str, Any],
) -> Result:
    """Score base and trained model on the benchmark's questions.

    The folder gets the answers and the gallery's `samples.json`, with the evaluation's identity.

    Returns:
        The content of `result.json`, and a table of it.

    Raises:
        ValueError: no question can be asked.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    # Answers of both models, without the images that cannot be read
    answers = _ask(recipe, section, policy, benchmark, identity)
    benchmark = _asked(benchmark, answers)
    by_side = {
        side: _final_answers(benchmark, texts)
        for side, texts in zip(SIDES, (answers.before, answers.after), strict=True)
    }
    num_empty = {side: sum(not text for texts in parts.values() for text in texts) for side, parts in by_side.items()}
    num_cut = dict(zip(SIDES, answers.num_cut, strict=True))
    _warn_of_bad_answers(num_empty, num_cut, section.decoding.max_new_tokens)

    # Metrics and files
    numbers, best = [] if section.best_of is None else sorted(section.best_of.n), dict[int, AnswersByPart]()
    if judges.choose is not None:
        candidates = [_final_answers(benchmark, texts) for texts in answers.candidates]
        best = _choose(benchmark, candidates, numbers, judges.choose)
    metrics = _measure_sides(benchmark, by_side | {_best(n): best[n] for n in numbers}, judges.measure, folder)
    comparisons = compare_all(metrics["before"], metrics["after"])
    about = {"of": identity, "score": benchmark.score_name, "table": _headline_table(comparisons)}
    samples = {**about, "samples": _samples(benchmark, by_side)}
    (folder / "samples.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    result = {
        "benchmark": section.benchmark,
        "model": recipe.model.path,
        "method": recipe.method.name,
        "questions": len(benchmark.questions),
        "left out": list(map(str, answers.skipped.values())),
        "empty answers": num_empty,
        "cut answers": num_cut,
    }
    measures, table = report(comparisons)
    of_best, rows = best_of.report(metrics["before"], {n: metrics[_best(n)] for n in numbers})
    return {**result, "measures": measures, **({"best_of": of_best} if of_best else {})}, table + rows


def _measure_sides(
    benchmark: Benchmark, sides: Mapping[str, AnswersByPart], judge: ResponseJudge | None, folder: Path
) -> dict[str, list[Metrics]]:
    """Judge the answers of all sides, if there is a judge; write them, and return their metrics by side."""
    judged = judge_answers(benchmark, list(sides.values()), judge) if judge is not None else [None] * len(sides)
    scores = dict(zip(sides, judged, strict=True))
    for side, parts in sides.items():
        _write_answers(folder / side, benchmark, parts, scores[side])
    return {side: _metrics(benchmark, parts, scores[side], scores["before"]) for side, parts in sides.items()}


def _best(n: int) -> str:
    """Return the name of the best of n answers, also of their folder."""
    return f"best-of-{n}"


def _final_answers(benchmark: Benchmark, texts: AnswersByQuestion) -> AnswersByPart:
    """Return the answers to each part's items, without thoughts."""
    return {
        part: [final_answer(texts[item.question.image, item.question.text]) for item in items]
        for part, items in benchmark.parts.items()
    }


def _choose(
    benchmark: Benchmark, candidates: Sequence[AnswersByPart], numbers: Sequence[int], judge: ResponseJudge
) -> dict[int, AnswersByPart]:
    """Return the best of the first n candidates to each item, by n."""
    scores = judge_answers(benchmark, candidates, judge)
    chosen = dict[int, AnswersByPart]()
    for n in numbers:
        # The best candidate of each item, part by part
        best = iter(best_of.best_candidates([_flat(parts) for parts in scores], n))
        chosen[n] = {
            part: [candidates[next(best)][part][index] for index in range(len(items))]
            for part, items in benchmark.parts.items()
        }
    return chosen


def judge_answers(benchmark: Benchmark, answers: Sequence[AnswersByPart], judge: ResponseJudge) -> list[ScoresByPart]:
    """Return the scores of several answers to every item, in one call, so that votes compare them all.

    A question that several parts ask has one answer of each, which is judged once.
    """
    keys = [(question.image, question.text) for question in benchmark.questions]
    responses_to = [dict(zip(keys, _flat(parts), strict=True)) for parts in answers]
    images, distinct = {name: benchmark.images(name) for name, _ in keys}, list(dict.fromkeys(keys))
    shown = [[images[name]] for name, _ in distinct] * len(answers)
    responses = [texts[key] for texts in responses_to for key in distinct]
    scores = judge(shown, [text for _, text in distinct] * len(answers), responses).view(len(answers), -1).tolist()
    judged = [dict(zip(distinct, own, strict=True)) for own in scores]
    return [
        {part: [own[x.question.image, x.question.text] for x in items] for part, items in benchmark.parts.items()}
        for own in judged
    ]


def _flat(parts: Mapping[str, Sequence[T]]) -> list[T]:
    return [value for values in parts.values() for value in values]


def _metrics(
    benchmark: Benchmark, answers: AnswersByPart, judged: ScoresByPart | None, base: ScoresByPart | None
) -> list[Metrics]:
    """Return the metrics of answers, and the win rate over the base model's if a judge scored both."""
    metrics = benchmark.score(answers)
    if judged is not None and base is not None:
        # Answers about one image depend on each other
        questions = [(part, item.question) for part, items in benchmark.parts.items() for item in items]
        keys = tuple((part, str(question.id)) for part, question in questions)
        groups = tuple(question.image for _, question in questions)
        metrics.append(preference.measure_scores(_flat(judged), _flat(base), keys, groups, "answers"))
    return metrics


def _asked(benchmark: Benchmark, answers: Answers) -> Benchmark:
    """Return the questions that were asked; warn of the images that are left out.

    Raises:
        ValueError: there is none.
    """
    left_out = list(answers.skipped.values())
    if left_out:
        logger.warning(f"{len(left_out)} images are skipped for both models: {format_rows(left_out)}")
    benchmark = benchmark.without_images(answers.skipped)
    if not benchmark.questions:
        raise ValueError(f"evaluate: no question could be asked ({format_rows(left_out)})")
    return benchmark


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
    folder = _folder(recipe, section)
    atomic_io.make_folder("evaluate.cache", folder)
    # All that answers depend on besides the model and its decoding
    settings = {
        "precision": recipe.train.precision,
        "seed": section.seed,
        "images": section.images or section.questions or section.benchmark,
        "config": fingerprint.fingerprint_config(policy.family.network),
        **tokenizer_dependencies(policy.family),
    }
    models = identity["trained"]["identity"]["model"], fingerprint.fingerprint_weights(policy.unwrapped)
    processes, best = current_processes(), section.best_of

    def cache(model: str, decoding: DecodingConfig, **more: int) -> AnswerCache:
        of_model = {**settings, **more, "model": model, "decoding": decoding.model_dump(exclude={"batch_size"})}
        return AnswerCache(folder, of_model, is_writer=processes.is_main)

    before, after = (cache(model, section.decoding) for model in models)
    # Candidates for the best of n: sampled answers of the base model, with a cache for each number
    sampling = section.decoding.model_copy(update={"temperature": best.temperature} if best is not None else {})
    numbers = range(1, max(best.n) + 1) if best is not None else ()
    candidates = [cache(models[0], sampling, candidate=number) for number in numbers]
    processes.gather(None)  # nobody writes before all have read
    return generate_answers(
        policy,
        [(question.image, question.text) for question in benchmark.questions],
        benchmark.images,
        section.decoding,
        seed=section.seed,
        caches=(before, after),
        candidates=candidates,
        sampling=sampling,
    )


def _folder(recipe: Recipe, section: EvaluateResponses) -> Path:
    """Return the folder of generated answers and of their scores."""
    return Path(recipe.output) / "answers" if section.cache == "auto" else Path(section.cache)


def read_metrics(recipe: Recipe) -> tuple[list[Metrics], list[Metrics]]:
    """Return the metrics of an evaluated run, before and after alignment, from the answers that it wrote."""
    before, after = _read_sides(recipe, SIDES)
    return before, after


def read_best(recipe: Recipe) -> dict[int, list[Metrics]]:
    """Return the metrics of the base model's best of n answers in an evaluated run, by n."""
    assert isinstance(recipe.evaluate, EvaluateResponses)
    numbers = sorted(recipe.evaluate.best_of.n) if recipe.evaluate.best_of is not None else []
    _, *best = _read_sides(recipe, ("before", *map(_best, numbers)))
    return dict(zip(numbers, best, strict=True))


def _read_sides(recipe: Recipe, sides: Sequence[str]) -> list[list[Metrics]]:
    """Return the metrics of the answers that an evaluation wrote, the base model's first."""
    assert isinstance(recipe.evaluate, EvaluateResponses)
    benchmark, folder = read_benchmark(recipe.evaluate), Path(recipe.output) / "evaluation"
    written = {
        (side, part): _read_answers(folder / side / f"{part}.jsonl")
        for side in sides
        for part, items in benchmark.parts.items()
        if items
    }
    # Questions without an answer of the base model were left out for both
    benchmark = benchmark.without_images(
        {
            item.question.image
            for part, items in benchmark.parts.items()
            for item in items
            if item.question.id not in written[sides[0], part]
        }
    )

    def answer(side: str, part: str, number: int | str) -> tuple[str, float | None]:
        if number not in written[side, part]:
            raise ValueError(f"{folder / side / part}.jsonl: has no answer to question {number}; {EVALUATE_AGAIN}")
        return written[side, part][number]

    def columns(side: str) -> tuple[AnswersByPart, ScoresByPart | None]:
        read = {part: [answer(side, part, x.question.id) for x in items] for part, items in benchmark.parts.items()}
        scores = {part: [score for _, score in rows if score is not None] for part, rows in read.items()}
        texts = {part: [text for text, _ in rows] for part, rows in read.items()}
        # A judge has scored all answers or none
        return texts, scores if len(_flat(scores)) == len(_flat(texts)) else None

    by_side = [columns(side) for side in sides]
    return [_metrics(benchmark, texts, scores, by_side[0][1]) for texts, scores in by_side]


def _read_answers(file: Path) -> dict[int | str, tuple[str, float | None]]:
    """Read the answers that `_write_answers` wrote, with the judge's scores, by question."""
    read = dict[int | str, tuple[str, float | None]]()
    for at, record in records(file):
        score = record.get("judged")
        read[take_question_id(at, record)] = take_text(at, record, "text"), score if isinstance(score, float) else None
    return read


# --------------------------------------------------------------------------------------------------------- output files


def _headline_table(comparisons: Sequence[MetricsComparison]) -> Table:
    rows = [row for comparison in comparisons for row in comparison.table(short=True)[1:]]
    return [("", "before", "after", "change [95 % interval]"), *rows]


def _write_answers(folder: Path, benchmark: Benchmark, answers: AnswersByPart, scores: ScoresByPart | None) -> None:
    """Write a file of answers for each part, in the format that `evaluate.answers` reads, with the judge's scores."""
    folder.mkdir()
    for part, items in benchmark.parts.items():
        lines = [
            {
                "question_id": item.question.id,
                "image": item.question.image,
                "question": item.question.text,
                "text": text,
                **({"judged": scores[part][index]} if scores is not None else {}),
            }
            for index, (item, text) in enumerate(zip(items, answers[part], strict=True))
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
