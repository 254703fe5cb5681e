"""Compare vision-language models by what they answer: from a recipe's section to numbers, files, and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign import assemble
from mmalign.answers import Book, Said, ask_both
from mmalign.data.pairs import listed
from mmalign.data.vocabularies import load_vocabulary
from mmalign.evaluation import amber, chair, crowds, object_halbench, pope
from mmalign.evaluation.answer_files import image_id, read_objects, read_responses, records
from mmalign.evaluation.benchmarks import (
    Amber,
    Answers,
    Benchmark,
    Descriptions,
    YesNo,
    in_folder,
    read_asked,
)
from mmalign.evaluation.counts import SIDES, Metrics, MetricsComparison, compare
from mmalign.families import Decoding, VisionLanguage
from mmalign.language.objects import Vocabulary
from mmalign.page.answers import Answer, Entry
from mmalign.policy import Policy
from mmalign.sections import EvaluateResponses, Files, Recipe

Table = list[tuple[str, ...]]
Say = Callable[[str], None]
_DESCRIBED = {"chair": chair.score, "object_halbench": object_halbench.score}
_PARSE: dict[str, pope.Parse] = {"published": pope.parse_published, "strict": pope.parse_strict}


def open_benchmark(section: EvaluateResponses) -> Benchmark:
    """The questions of a recipe's benchmark, once it is known that all files are there and fit.

    Raises:
        ValueError: a file or an image is missing, or a file is not as expected.
    """
    try:
        if section.benchmark == "crowds":
            return crowds.benchmark(section.pictures, section.split, section.seed)
        assert section.images is not None, "the section asks for them"
        if section.benchmark == "pope":
            questions = _pope_questions(section)
            images = in_folder(section.images, [question for asked in questions.values() for question in asked])
            return YesNo(questions, images, _PARSE[section.parse])
        if section.benchmark == "amber":
            assert isinstance(section.annotations, str)
            queries = read_asked(Path(section.annotations) / "query" / "query_all.json", section.prompt)
            return Amber(queries, amber.read_amber(section.annotations), in_folder(section.images, queries))
        asked = read_asked(_question_file(section), section.prompt)
        words = load_vocabulary("vocabulary", section.vocabulary)
        truth = _truth(section, words, [question.image for question in asked])
        return Descriptions(asked, truth, words, in_folder(section.images, asked), _DESCRIBED[section.benchmark])
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error


def compare_answers(
    recipe: Recipe,
    policy: Policy[VisionLanguage],
    benchmark: Benchmark,
    folder: Path,
    of: Mapping[str, Any],
    say: Say,
) -> tuple[dict[str, Any], Table]:
    """Ask base and trained model, score what they say, and write it to `folder`: answer files, and the page's samples.

    Args:
        recipe: whose `evaluate` section says how they answer.
        policy: the trained model, with its base as reference.
        benchmark: what is asked.
        folder: where to write.
        of: what this evaluation is of.
        say: takes a line of text.
    """
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    said = _ask(recipe, section, policy, benchmark, of)
    if said.left_out:
        say(f"{len(said.left_out)} images are left out, for both models: {listed(list(said.left_out.values()))}")
    benchmark = benchmark.without(said.left_out)
    if not any(benchmark.parts.values()):
        raise ValueError(f"evaluate: no question could be asked ({listed(list(said.left_out.values()))})")
    sides = [
        {part: [answers[q.image, q.text] for q in asked] for part, asked in benchmark.parts.items()}
        for answers in (said.before, said.after)
    ]
    empty = {
        side: sum(not text for part in given.values() for text in part)
        for side, given in zip(SIDES, sides, strict=True)
    }
    for side, number in empty.items():
        if number:
            say(f"{number:,} answers {side} alignment are empty; see whether the model knows the prompt's layout")
    compared = _compared(*map(benchmark.score, sides))
    for side, answers in zip(SIDES, sides, strict=True):
        _write_answers(folder / side, benchmark, answers)
    samples = {
        "of": of,
        "score": benchmark.score_name,
        "table": _short(compared),
        "samples": _samples(benchmark, sides),
    }
    (folder / "samples.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    result = {
        "benchmark": section.benchmark,
        "model": recipe.model.path,
        "method": recipe.method.name,
        "questions": sum(map(len, benchmark.parts.values())),
        "left out": [str(dropped) for dropped in said.left_out.values()],
        "empty answers": empty,
        "measures": {one.before.benchmark: one.as_dict() for one in compared},
    }
    return result, [row for one in compared for row in one.table()]


def _ask(
    recipe: Recipe,
    section: EvaluateResponses,
    policy: Policy[VisionLanguage],
    benchmark: Benchmark,
    of: Mapping[str, Any],
) -> Said:
    """Ask both models all of the benchmark's questions that they have not answered before."""
    folder = Path(recipe.output) / "answers" if section.cache == "auto" else Path(section.cache)
    assemble.make_folder("evaluate.cache", folder)
    depends = {
        "decoding": section.decoding.model_dump(exclude={"batch_size"}),
        "precision": recipe.train.precision,
        "seed": section.seed,
        "images": section.images or section.benchmark,
    }
    models = of["trained"]["identity"]["model"], assemble.fingerprint(policy.unwrapped)
    before, after = (Book(folder, {**depends, "model": model}) for model in models)
    return ask_both(
        policy,
        [(question.image, question.text) for asked in benchmark.parts.values() for question in asked],
        benchmark.images,
        Decoding(**section.decoding.model_dump()),
        seed=section.seed,
        books=(before, after),
    )


def score_files(section: EvaluateResponses) -> tuple[dict[str, Any], Table]:
    """Score answers that are there already, of both models or of one; no model is loaded and no image read.

    Raises:
        ValueError: a file is missing or bad, or does not answer the questions.
    """
    files = section.answers
    assert files is not None
    score = {"pope": _score_pope, "amber": _score_amber}.get(section.benchmark, _score_descriptions)
    try:
        after = score(section, files.after)
        if files.before is None:
            measures = {counts.benchmark: counts.as_dict() for counts in after}
            table = [row for counts in after for row in counts.table()]
        else:
            compared = _compared(score(section, files.before), after)
            measures = {one.before.benchmark: one.as_dict() for one in compared}
            table = [row for one in compared for row in one.table()]
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    return {"benchmark": section.benchmark, "answers": files.model_dump(), "measures": measures}, table


def entries(section: EvaluateResponses, samples: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Samples of an evaluation, with their images, as the page takes them.

    Raises:
        ValueError: an image is not there any more.
    """
    images = open_benchmark(section).images
    return [
        Entry(
            images(sample["image"]),
            sample["image"],
            sample["question"],
            sample["truth"],
            *(
                Answer(**{**sample[side], "invented": [tuple(place) for place in sample[side]["invented"]]})
                for side in SIDES
            ),
        )
        for sample in samples
    ]


def count_answers(section: EvaluateResponses, folder: Path) -> tuple[list[Metrics], list[Metrics]]:
    """What was counted in the answers that `compare_answers` has written to a folder, before and after."""
    benchmark = open_benchmark(section)
    said = [
        {part: _written_answers(folder / side / f"{part}.jsonl") for part in benchmark.parts if benchmark.parts[part]}
        for side in SIDES
    ]
    left_out = {q.image for part, asked in benchmark.parts.items() for q in asked if q.id not in said[0][part]}
    benchmark = benchmark.without(left_out)
    before, after = (
        benchmark.score({part: [answers[part][q.id] for q in asked] for part, asked in benchmark.parts.items()})
        for answers in said
    )
    return before, after


def _written_answers(file: Path) -> dict[int, str]:
    return {record["question_id"]: record["text"] for _, record in records(file)}


# --------------------------------------------------------------------------------------------------- files that come in


def _pope_questions(section: EvaluateResponses) -> dict[str, list[pope.Question]]:
    """The questions of each split: from files, or built of annotations."""
    if isinstance(section.questions, str):
        return {Path(section.questions).stem: pope.read_questions(section.questions)}
    if section.questions is not None:
        return {split: pope.read_questions(file) for split, file in section.questions.items()}
    assert isinstance(section.annotations, str)
    objects = read_objects(section.annotations)
    return {split: pope.build(objects, split, seed=section.seed) for split in pope.SPLITS}


def _question_file(section: EvaluateResponses) -> str:
    """Where the questions on images are; records of annotations name their images, too."""
    file = section.questions or section.annotations
    if not isinstance(file, str):
        raise ValueError(
            "questions: MSCOCO's annotations do not say which images to ask about; add a file of questions"
        )
    return file


def _truth(section: EvaluateResponses, words: Vocabulary, images: Sequence[str]) -> chair.Truth:
    """What is in the images that are asked about."""
    where = section.annotations
    if isinstance(where, str):
        return chair.read_truth(where, words)
    assert where is not None
    return chair.read_coco(where.instances, where.captions, words, {image_id(image) for image in images})


def _score_pope(section: EvaluateResponses, files: Files) -> list[Metrics]:
    questions = _pope_questions(section)
    given = {next(iter(questions)): files} if isinstance(files, str) else files
    if set(given) != set(questions):
        raise ValueError(
            f"answers: came for {', '.join(given)}; expected a file for each split: {', '.join(questions)}"
        )
    answers = {split: pope.read_answers(given[split], asked) for split, asked in questions.items()}
    return [pope.score(questions, answers, _PARSE[section.parse])]


def _score_amber(section: EvaluateResponses, files: Files) -> list[Metrics]:
    assert isinstance(section.annotations, str)
    given = [files] if isinstance(files, str) else list(files.values())
    read = [amber.read_responses(file) for file in given]
    together = {number: answer for some in read for number, answer in some.items()}
    if len(together) < sum(map(len, read)):
        raise ValueError(f"answers: {', '.join(given)} answer some questions twice; expected one answer to each")
    return amber.score(together, amber.read_amber(section.annotations))


def _score_descriptions(section: EvaluateResponses, files: Files) -> list[Metrics]:
    if not isinstance(files, str):
        raise ValueError(f"answers: came for {', '.join(files)}; expected one file, since there are no splits")
    assert section.questions is None or isinstance(section.questions, str)
    responses, words = read_responses(files, section.questions), load_vocabulary("vocabulary", section.vocabulary)
    truth = _truth(section, words, [response.image for response in responses])
    return [_DESCRIBED[section.benchmark](responses, truth, words)]


# ---------------------------------------------------------------------------------------------------- files that go out


def _compared(before: Sequence[Metrics], after: Sequence[Metrics]) -> list[MetricsComparison]:
    return [compare(theirs, ours) for theirs, ours in zip(before, after, strict=True)]


def _short(compared: Sequence[MetricsComparison]) -> Table:
    """One table of the main measures."""
    rows = [row for one in compared for row in one.table(short=True)[1:]]
    return [("", "before", "after", "change [95 % interval]"), *rows]


def _write_answers(folder: Path, benchmark: Benchmark, answers: Answers) -> None:
    """A file for each part, as `evaluate.answers` takes them."""
    folder.mkdir()
    for part, asked in benchmark.parts.items():
        records = [
            {"question_id": question.id, "image": question.image, "question": question.text, "text": answer}
            for question, answer in zip(asked, answers[part], strict=True)
        ]
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def _samples(benchmark: Benchmark, sides: Sequence[Answers]) -> list[dict[str, Any]]:
    """Every question with both answers and what each is worth."""
    samples = []
    for part, asked in benchmark.parts.items():
        for number, question in enumerate(asked):
            sample: dict[str, Any] = {"part": part, "image": question.image, "question": question.text}
            sample["truth"] = benchmark.truth(part, number)
            for side, answers in zip(SIDES, sides, strict=True):
                text = answers[part][number]
                sample[side] = {"text": text, **asdict(benchmark.judge(part, number, text))}
            samples.append(sample)
    return samples
