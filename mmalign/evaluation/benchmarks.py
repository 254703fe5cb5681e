"""What models are asked about images, and what their answers are worth: POPE, CHAIR, Object HalBench, AMBER.

A benchmark has parts (POPE's splits; descriptions), and a part has questions, each about one image. Answers come in the
order of the questions. They are scored in two ways: all together, as the papers count, and one by one, for people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from mmalign.data.images import decode
from mmalign.data.rows import file_ref
from mmalign.evaluation import amber, chair, pope
from mmalign.evaluation.answer_files import Response, check_ids, image_id, records, shown, take_text
from mmalign.evaluation.counts import Metrics
from mmalign.language.objects import Vocabulary, singular, tokens

Answers = Mapping[str, Sequence[str]]  # from the name of a part to the answers to its questions, in their order
Images = Callable[[str], Image.Image]  # an image by its name; raises BadImage where it cannot be read
DESCRIPTIONS = "descriptions"  # the part of a benchmark that asks what is in an image
DESCRIBED = "objects of the image that are named, less mentions of invented ones"
RIGHT = "1 for a right yes or no, 0 for a wrong one"


class Asked(Protocol):
    """A question about an image; `id` tells it from the others of its part."""

    @property
    def id(self) -> int: ...  # noqa: D102
    @property
    def image(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


A = TypeVar("A", bound=Asked)


@dataclass(frozen=True)
class Question:
    """A question about an image that has no one right answer: what is to be seen."""

    id: int
    image: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth, for people.

    Attributes:
        score: better when higher; the benchmark's `score_name` says what it is.
        note: the same in words.
        invented: where the answer names what is not in the image, [start, end).
    """

    score: float
    note: str
    invented: tuple[tuple[int, int], ...] = ()


class Benchmark(Protocol):
    """Questions about images, and how answers to them are scored."""

    @property
    def parts(self) -> Mapping[str, Sequence[Asked]]:
        """The questions, by the part that they belong to."""

    @property
    def score_name(self) -> str:
        """What the score of one answer is, in words."""

    @property
    def images(self) -> Images:
        """The image that questions call by a name."""

    def without(self, images: Collection[str]) -> Benchmark:
        """The same, less the questions about these images."""

    def score(self, answers: Answers) -> list[Metrics]:
        """What was counted in the answers, one for each set of measures."""

    def judge(self, part: str, number: int, answer: str) -> Verdict:
        """What an answer to the question of this number is worth."""

    def truth(self, part: str, number: int) -> str:
        """What would have been right, for people."""


@dataclass(frozen=True)
class Descriptions:
    """Descriptions of images, whose objects are known: CHAIR, or Object HalBench.

    Attributes:
        questions: what is asked.
        objects: from an image's id (`answer_files.image_id`) to its objects, by the vocabulary's names.
        vocabulary: the words for them.
        images: the image by its name.
        count: `chair.score` or `object_halbench.score`.

    Raises:
        ValueError: an image has no annotation, or is asked the same twice.
    """

    questions: Sequence[Asked]
    objects: chair.Truth
    vocabulary: Vocabulary
    images: Images
    count: Callable[[Sequence[Response], chair.Truth, Vocabulary], Metrics] = chair.score

    def __post_init__(self) -> None:
        check_ids("annotations", [image_id(question.image) for question in self.questions], self.objects)
        times = Counter((image_id(question.image), question.text) for question in self.questions)
        again = next((asked for asked, number in times.items() if number > 1), None)
        if again is not None:
            raise ValueError(f"questions: {again[1]!r} is asked twice of image {again[0]}; expected it once")

    @property
    def parts(self) -> Mapping[str, Sequence[Asked]]:
        """See Benchmark."""
        return {DESCRIPTIONS: self.questions}

    @property
    def score_name(self) -> str:
        """See Benchmark."""
        return DESCRIBED

    def without(self, images: Collection[str]) -> Descriptions:
        """See Benchmark."""
        return replace(self, questions=_less(self.questions, images))

    def score(self, answers: Answers) -> list[Metrics]:
        """See Benchmark."""
        asked = zip(self.questions, answers[DESCRIPTIONS], strict=True)
        responses = [Response(image_id(question.image), answer, question.text) for question, answer in asked]
        return [self.count(responses, self.objects, self.vocabulary)]

    def judge(self, part: str, number: int, answer: str) -> Verdict:
        """See Benchmark."""
        objects = self._objects(number)
        judged = chair.judge(answer, objects, self.vocabulary)
        places = tuple((mention.start, mention.end) for mention in judged.invented)
        return _described(len(judged.found), len(objects), len(judged.invented), places)

    def truth(self, part: str, number: int) -> str:
        """See Benchmark."""
        return ", ".join(sorted(self._objects(number))) or "no object"

    def _objects(self, number: int) -> Collection[str]:
        return self.objects[image_id(self.questions[number].image)]


@dataclass(frozen=True)
class YesNo:
    """Yes/no questions on objects in images: POPE.

    Attributes:
        parts: the questions of each split.
        images: the image by its name.
        parse: how a yes and a no are read.
    """

    parts: Mapping[str, Sequence[pope.Question]]
    images: Images
    parse: pope.Parse = pope.parse_published

    @property
    def score_name(self) -> str:
        """See Benchmark."""
        return RIGHT

    def without(self, images: Collection[str]) -> YesNo:
        """See Benchmark."""
        return replace(self, parts={part: _less(asked, images) for part, asked in self.parts.items()})

    def score(self, answers: Answers) -> list[Metrics]:
        """See Benchmark."""
        return [pope.score(self.parts, {part: answers[part] for part in self.parts}, self.parse)]

    def judge(self, part: str, number: int, answer: str) -> Verdict:
        """See Benchmark."""
        return _said(self.parse(answer), self.parts[part][number].answer, answer)

    def truth(self, part: str, number: int) -> str:
        """See Benchmark."""
        return "yes" if self.parts[part][number].answer else "no"


@dataclass(frozen=True)
class Amber:
    """AMBER: descriptions, and yes/no questions on existence, attributes and relations.

    Attributes:
        questions: all of them, by the benchmark's ids.
        files: the benchmark's annotations.
        images: the image by its name.

    Raises:
        ValueError: a question has no annotation.
    """

    questions: Sequence[Asked]
    files: amber.Amber
    images: Images

    def __post_init__(self) -> None:
        unknown = [question.id for question in self.questions if question.id not in self.files.items]
        if unknown:
            raise ValueError(
                f"questions: id {unknown[0]} is none of annotations.json; expected the files of one release"
            )

    @property
    def parts(self) -> Mapping[str, Sequence[Asked]]:
        """See Benchmark."""
        kinds = {DESCRIPTIONS: amber.Description, "questions": amber.Claim}
        parts = {
            part: [question for question in self.questions if isinstance(self.files.items[question.id], kind)]
            for part, kind in kinds.items()
        }
        return {part: asked for part, asked in parts.items() if asked}

    @property
    def score_name(self) -> str:
        """See Benchmark."""
        return f"{DESCRIBED}; {RIGHT}"

    def without(self, images: Collection[str]) -> Amber:
        """See Benchmark."""
        return replace(self, questions=_less(self.questions, images))

    def score(self, answers: Answers) -> list[Metrics]:
        """See Benchmark."""
        said = {q.id: a for part, asked in self.parts.items() for q, a in zip(asked, answers[part], strict=True)}
        return amber.score(said, self.files)

    def judge(self, part: str, number: int, answer: str) -> Verdict:
        """See Benchmark."""
        item = self.files.items[self.parts[part][number].id]
        if isinstance(item, amber.Claim):
            return _said(pope.parse_strict(answer), item.answer, answer)
        found = amber.find(answer, item, self.files)
        words = set(found.invented)
        places = tuple((start, end) for word, start, end in tokens(answer) if {word, singular(word)} & words)
        return _described(found.covered, len(item.truth), len(found.invented), places)

    def truth(self, part: str, number: int) -> str:
        """See Benchmark."""
        item = self.files.items[self.parts[part][number].id]
        if isinstance(item, amber.Claim):
            return "yes" if item.answer else "no"
        return ", ".join(item.truth)


@dataclass(frozen=True)
class Together:
    """Two benchmarks on the same images, with different parts."""

    first: Benchmark
    second: Benchmark

    @property
    def parts(self) -> Mapping[str, Sequence[Asked]]:
        """See Benchmark."""
        return {**self.first.parts, **self.second.parts}

    @property
    def score_name(self) -> str:
        """See Benchmark."""
        return f"{self.first.score_name}; {self.second.score_name}"

    @property
    def images(self) -> Images:
        """See Benchmark."""
        return self.first.images

    def without(self, images: Collection[str]) -> Together:
        """See Benchmark."""
        return Together(self.first.without(images), self.second.without(images))

    def score(self, answers: Answers) -> list[Metrics]:
        """See Benchmark."""
        return [*self.first.score(answers), *self.second.score(answers)]

    def judge(self, part: str, number: int, answer: str) -> Verdict:
        """See Benchmark."""
        return self._of(part).judge(part, number, answer)

    def truth(self, part: str, number: int) -> str:
        """See Benchmark."""
        return self._of(part).truth(part, number)

    def _of(self, part: str) -> Benchmark:
        return self.first if part in self.first.parts else self.second


def read_asked(path: str | Path, prompt: str) -> list[Question]:
    """What is asked: records with `image`, and the question under `text`, `question` or `query`.

    Args:
        path: the file; records of annotations will do, since the rest of them is not looked at.
        prompt: what is asked where a record has no question.

    Raises:
        ValueError: the file is bad or empty, or an id stands there twice.
    """
    questions: dict[int, Question] = {}
    for where, record in records(path):
        name = next((name for name in ("text", "question", "query") if name in record), None)
        text = prompt if name is None else take_text(where, record, name)
        number = record.get("question_id", record.get("id", len(questions) + 1))
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{where}: question_id is {shown(number)}; expected a whole number")
        if number in questions:
            raise ValueError(f"{where}: question_id {number} stands there twice; expected another for each question")
        questions[number] = Question(number, take_text(where, record, "image"), text)
    if not questions:
        raise ValueError(f'{path} is empty; expected records {{"image": "1.jpg", "question": "What is there?"}}')
    return list(questions.values())


def in_folder(folder: str | Path, asked: Sequence[Asked]) -> Images:
    """The images of a folder, once it is known that those that are asked about are there.

    Raises:
        ValueError: one is not.
    """
    place, names = Path(folder), {question.image for question in asked}
    absent = sorted(name for name in names if not (place / name).is_file())
    if absent:
        raise ValueError(
            f"images: {folder} has no {', '.join(absent[:3])} ({len(absent):,} of {len(names):,} images are missing); "
            "expected every image that is asked about, by the name that its question has"
        )
    return lambda name: decode(file_ref(str(place / name), name))


def _less(asked: Sequence[A], images: Collection[str]) -> list[A]:
    return [question for question in asked if question.image not in images]


def _described(found: int, there: int, invented: int, places: tuple[tuple[int, int], ...]) -> Verdict:
    """A description that finds some of the objects that are there, and invents others."""
    return Verdict(found - invented, f"{found} of {there} named, {invented or 'none'} invented", places)


def _said(said: bool | None, right: bool, answer: str) -> Verdict:
    """An answer that was read as yes, no or neither; a yes to what is not there is an invention as a whole."""
    invented = ((0, len(answer)),) if said and not right and answer else ()
    note = "neither yes nor no" if said is None else "right" if said is right else "wrong"
    return Verdict(float(said is right), note, invented)
