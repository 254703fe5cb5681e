"""Benchmarks of vision-language models: questions about images, and scores of the answers.

A benchmark has parts (POPE's splits; captions). A part has items, each one question about one image. Answers come in
the order of the items. They are scored all together, as in the papers, and one by one, for the gallery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mmalign.data.formats.image_files import find_contained, is_file
from mmalign.data.images import decode_file
from mmalign.evaluation.annotations import Question, Response, check_annotated, image_id, match_images
from mmalign.evaluation.benchmarks import amber, chair, pope
from mmalign.evaluation.metrics import Metrics
from mmalign.language.objects import Vocabulary, singular, tokens
from mmalign.language.yes_no import parse_strict

AnswersByPart = Mapping[str, Sequence[str]]  # the answers to each part's items, in the order of the items
Images = Callable[[str], Image.Image]  # an image by its name; raises BadImage if it cannot be read
CAPTIONS = "descriptions"  # the part of a benchmark that asks for descriptions
CAPTION_SCORE = "objects of the image that are named, less mentions of invented ones"
YES_NO_SCORE = "1 for a right yes or no, 0 for a wrong or unclear one"


@dataclass(frozen=True)
class RatedAnswer:
    """A model's answer and its rating.

    Attributes:
        text: the answer.
        score: a number, higher is better; the benchmark's `score_name` explains it.
        note: the score in words, such as "2 of 3 named, 1 invented".
        invented: spans [start, end) of the text that name objects absent from the image, in order and without overlap.
    """

    text: str
    score: float
    note: str
    invented: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Item:
    """A question with its ground-truth answer in words, and a function that rates answers to it."""

    question: Question
    truth: str
    rate: Callable[[str], RatedAnswer]


Parts = Mapping[str, Sequence[Item]]


@dataclass(frozen=True)
class Benchmark:
    """Items by part, their images, the meaning of an answer's score, and the metrics of all answers."""

    parts: Parts
    images: Images
    score_name: str
    measure: Callable[[Parts, AnswersByPart], list[Metrics]]

    @property
    def questions(self) -> list[Question]:
        """All questions, part by part."""
        return [item.question for items in self.parts.values() for item in items]

    def without_images(self, images: Collection[str]) -> Benchmark:
        """Return the benchmark without the questions about these images."""
        parts = {
            part: [item for item in items if item.question.image not in images] for part, items in self.parts.items()
        }
        return replace(self, parts=parts)

    def score(self, answers: AnswersByPart) -> list[Metrics]:
        """Return the metrics of answers to all items."""
        return self.measure(self.parts, answers)


def caption_benchmark(
    questions: Sequence[Question],
    objects: chair.Truth,
    vocabulary: Vocabulary,
    images: Images,
    score: Callable[[Sequence[Response], chair.Truth, Vocabulary], Metrics] = chair.score,
) -> Benchmark:
    """Return a benchmark of descriptions of images with known objects: CHAIR, or Object HalBench with its `score`.

    Raises:
        ValueError: an image has no annotation, or a question is repeated.
    """
    # Questions may name an image by another path than its annotation does
    images_asked = match_images([image_id(question.image) for question in questions], objects)
    check_annotated("annotations", images_asked, objects)
    ids = dict(zip((question.image for question in questions), images_asked, strict=True))
    # Answers are told apart by image and question
    counts = Counter((ids[question.image], question.text) for question in questions)
    repeated = next((key for key, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"questions: {repeated[1]!r} is asked twice of image {repeated[0]}; expected it once")

    def measure(parts: Parts, answers: AnswersByPart) -> list[Metrics]:
        pairs = zip((item.question for item in parts[CAPTIONS]), answers[CAPTIONS], strict=True)
        responses = [Response(ids[question.image], answer, question.text) for question, answer in pairs]
        return [score(responses, objects, vocabulary)]

    def item(question: Question) -> Item:
        truth = objects[ids[question.image]]

        def rate(answer: str) -> RatedAnswer:
            match = chair.match_objects(answer, truth, vocabulary)
            spans = tuple((mention.start, mention.end) for mention in match.invented)
            return _rate_caption(answer, len(match.present), len(truth), len(match.invented), spans)

        return Item(question, ", ".join(sorted(truth)) or "no object", rate)

    return Benchmark({CAPTIONS: [item(question) for question in questions]}, images, CAPTION_SCORE, measure)


def yes_no_benchmark(
    questions: Mapping[str, Sequence[Question]], images: Images, parse: pope.Parse = pope.parse_published
) -> Benchmark:
    """Return POPE, a benchmark of yes/no questions on objects in images, by split."""

    def measure(parts: Parts, answers: AnswersByPart) -> list[Metrics]:
        asked = {part: [item.question for item in items] for part, items in parts.items()}
        return [pope.score(asked, {part: answers[part] for part in parts}, parse)]

    parts = {part: [_yes_no_item(question, parse) for question in asked] for part, asked in questions.items()}
    return Benchmark(parts, images, YES_NO_SCORE, measure)


def amber_benchmark(
    questions: Sequence[Question], annotations: amber.Annotations, images: Images, parse: pope.Parse = parse_strict
) -> Benchmark:
    """Return AMBER: descriptions, and yes/no questions on existence, attributes and relations.

    Raises:
        ValueError: a question has no annotation.
    """
    unknown = [question.id for question in questions if question.id not in annotations.items]
    if unknown:
        raise ValueError(f"questions: id {unknown[0]} is not in annotations.json; use files from the same release")

    def measure(parts: Parts, answers: AnswersByPart) -> list[Metrics]:
        by_item = (pair for part, items in parts.items() for pair in zip(items, answers[part], strict=True))
        return amber.score({int(item.question.id): answer for item, answer in by_item}, annotations, parse)

    def caption_item(question: Question, item: amber.GenerativeItem) -> Item:
        def rate(answer: str) -> RatedAnswer:
            match = amber.match_objects(answer, item, annotations)
            words = set(match.invented)
            # Words of the answer that name an invented object, also in the plural
            spans = tuple((start, end) for word, start, end in tokens(answer) if {word, singular(word)} & words)
            return _rate_caption(answer, match.num_covered, len(item.truth), len(match.invented), spans)

        return Item(question, ", ".join(item.truth), rate)

    # The annotation says whether a question asks for a description
    parts: dict[str, list[Item]] = {CAPTIONS: [], "questions": []}
    for question in questions:
        annotation = annotations.items[int(question.id)]
        if isinstance(annotation, amber.GenerativeItem):
            parts[CAPTIONS].append(caption_item(question, annotation))
        else:
            parts["questions"].append(_yes_no_item(replace(question, answer=annotation.answer), parse))
    parts = {part: items for part, items in parts.items() if items}
    return Benchmark(parts, images, f"{CAPTION_SCORE}; {YES_NO_SCORE}", measure)


def combine(first: Benchmark, second: Benchmark) -> Benchmark:
    """Return two benchmarks on the same images, with different parts, as one."""

    def measure(parts: Parts, answers: AnswersByPart) -> list[Metrics]:
        return [
            metrics
            for benchmark in (first, second)
            for metrics in benchmark.measure({part: parts[part] for part in benchmark.parts}, answers)
        ]

    score_name = f"{first.score_name}; {second.score_name}"
    return Benchmark({**first.parts, **second.parts}, first.images, score_name, measure)


def open_folder(folder: str | Path, questions: Sequence[Question]) -> Images:
    """Return a function that reads a folder's images by name.

    Raises:
        ValueError: an image of these questions is missing, or outside the folder.
    """
    names, place = {question.image for question in questions}, "images"
    missing = sorted(name for name in names if not is_file(find_contained(Path(folder), name, place)))
    if missing:
        raise ValueError(
            f"images: {folder} has no {', '.join(missing[:3])} ({len(missing):,} of {len(names):,} images are "
            "missing); expected every image of the questions, under the name given there"
        )
    return lambda name: decode_file(find_contained(Path(folder), name, place), name)


def _yes_no_item(question: Question, parse: pope.Parse) -> Item:
    def rate(answer: str) -> RatedAnswer:
        # A person cannot read an unclear answer, whatever the parser takes it for
        reading, is_clear = parse(answer), parse_strict(answer) is not None
        is_right = is_clear and reading is question.answer
        # A yes about an absent object is an invention as a whole
        invented = ((0, len(answer)),) if is_clear and reading and not question.answer else ()
        note = "right" if is_right else "wrong" if is_clear else "unclear"
        return RatedAnswer(answer, float(is_right), note, invented)

    return Item(question, "yes" if question.answer else "no", rate)


def _rate_caption(
    answer: str, num_found: int, num_true: int, num_invented: int, spans: tuple[tuple[int, int], ...]
) -> RatedAnswer:
    note = f"{num_found} of {num_true} named, {num_invented or 'none'} invented"
    return RatedAnswer(answer, num_found - num_invented, note, spans)
