"""Readers of questions, object annotations and answers from JSON and JSONL files, one record for each.

Image ids come as numbers (42), digits ("42") or MSCOCO's file names ("val2014/COCO_val2014_000000000042.jpg"), with or
without folder and suffix. All become "42"; any other name is unchanged.

Readers raise ValueError for an invalid or empty file and for a repeated record. The message begins with its location.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmalign.data.formats.files import records, shorten
from mmalign.evaluation.question_files import read_rows
from mmalign.language.yes_no import final_answer

Record = Mapping[str, object]
K = TypeVar("K")
V = TypeVar("V")

_COCO_NAME = re.compile(r"(?:.*[/\\])?(?:COCO_\w+_)?(\d{12})(?:\.(?:jpg|jpeg|png))?", re.IGNORECASE)
_DIGITS = re.compile(r"0|[1-9][0-9]{0,17}")
_IMAGE = "<image>"  # a placeholder of other programs; the image precedes every question here


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        id: a number or a name, unique within a file.
        image: the image's name.
        text: the question.
        answer: True if "yes" is right, False if "no" is; None for a question that asks for a description.
    """

    id: int | str
    image: str
    text: str
    answer: bool | None = None


@dataclass(frozen=True)
class Response:
    """A model's description of an image; `question` distinguishes several responses to one image."""

    image: str
    text: str
    question: str = ""


# ------------------------------------------------- fields of a record: the value under the first of `names` that it has


def image_id(value: object) -> str:
    """Return the id of an image: "42" for 42, "42" and "val2014/COCO_val2014_000000000042.jpg"."""
    text = str(value)
    coco = _COCO_NAME.fullmatch(text)
    digits = coco.group(1) if coco else text
    return (digits.lstrip("0") or "0") if digits.isascii() and digits.isdigit() else text


def take(location: str, record: Record, *names: str) -> object:
    """Return a value of any type."""
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"{location} has {shorten(list(record))}; expected {' or '.join(map(repr, names))}")


def take_text(location: str, record: Record, *names: str) -> str:
    """Return a string, which may be empty."""
    value = take(location, record, *names)
    if not isinstance(value, str):
        raise ValueError(
            f"{location}: {' or '.join(names)} is {shorten(value)}; expected a string (empty where no answer)"
        )
    return value


def take_number(location: str, record: Record, *names: str) -> int:
    """Return a whole number, also from its digits."""
    value = take(location, record, *names)
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{location}: {names[0]} is {shorten(value)}; expected a whole number")
    return value


def take_id(location: str, record: Record, *names: str) -> int | str:
    """Return an id or a file name: a whole number or a nonempty string."""
    value = take(location, record, *names)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{location}: {' or '.join(names)} is {shorten(value)}; expected a number or a name")
    return value


def take_image_id(location: str, record: Record, *names: str) -> str:
    """Return an image id, from a whole number or a nonempty string."""
    return image_id(take_id(location, record, *names))


def take_question_id(location: str, record: Record, default: int | None = None) -> int | str:
    """Return the id of a question: a whole number, also from its digits, or a name.

    Without an id, return `default` if it is given.
    """
    name = "id" if "id" in record and "question_id" not in record else "question_id"
    if default is not None and name not in record:
        return default
    value = take_id(location, record, name)
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value


def take_question(location: str, record: Record, *names: str) -> str:
    """Return the text of a question without placeholders of its image."""
    parts = (part.strip() for part in take_text(location, record, *names).split(_IMAGE))
    return " ".join(filter(None, parts))


def take_names(location: str, record: Record, name: str) -> tuple[str, ...]:
    """Return the strings of a list, which may be empty; its strings may not."""
    value = take(location, record, name)
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(
            f'{location}: {name} is {shorten(value)}; expected a list of names, such as ["dog", "hot dog"]'
        )
    return tuple(value)


def index(path: str | Path, key_name: str, entries: Iterable[tuple[str, K, V]], example: str) -> dict[K, V]:
    """Collect the values of a file by key, from (location, key, value); a message names the keys and an example."""
    values: dict[K, V] = {}
    for location, key, value in entries:
        if key in values:
            raise ValueError(f"{location}: duplicate {key_name} {key}; expected one record for each")
        values[key] = value
    if not values:
        raise ValueError(f"{path} is empty; expected {example}")
    return values


def check_annotated(name: str, images: Sequence[str], annotated: Mapping[str, object]) -> None:
    """Raise ValueError if an image has no annotation."""
    unknown = sorted({image for image in images if image not in annotated})
    if unknown:
        raise ValueError(
            f"{name}: {len(unknown)} of {len(set(images))} images have no annotation ({_list(unknown)}; annotated are "
            f"{_list(list(annotated))}); expected an annotation for every image, an empty one for an image without "
            "objects"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names) or "none"


def match_images(images: Sequence[str], annotated: Iterable[str]) -> list[str]:
    """Return the annotated names of images that files name by another path, or without their suffix.

    A name is replaced by the only annotated one that agrees in its last part, or in its last part without suffix; a
    name that is annotated itself, or that several or none agree with, is unchanged.
    """
    known = set(annotated)
    unknown = {image for image in images if image not in known}
    if not unknown:
        return list(images)
    # By the last part of the path, then also without its suffix; a name that two images share matches nothing
    matches: dict[str, str] = {}
    for part in (_last_part, _stem):
        candidates = Counter(map(part, known))
        by_part = {part(name): name for name in known if candidates[part(name)] == 1}
        matches |= {image: by_part[part(image)] for image in unknown - set(matches) if part(image) in by_part}
    return [matches.get(image, image) for image in images]


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


def _stem(name: str) -> str:
    return re.sub(r"\.(?:jpg|jpeg|png|webp|gif|bmp)$", "", _last_part(name), flags=re.IGNORECASE)


# ----------------------------------------------------------------------------------------------------------- the files


def read_objects(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read the objects of each image, in the order of the file, from records {"image", "objects"}.

    Image names are those of the file. An object listed twice for an image is returned once.
    """
    entries = (
        (at, str(take_id(at, record, "image", "image_id")), tuple(dict.fromkeys(take_names(at, record, "objects"))))
        for at, record in records(path)
    )
    return index(path, "image", entries, 'records {"image": "1.jpg", "objects": ["dog", "ball"]}')


def read_questions(path: str | Path, prompt: str) -> list[Question]:
    """Read open questions: records with `image`, and the question under `text`, `question` or `query`.

    Args:
        path: a file of questions, or of annotations, whose other keys are ignored.
        prompt: the question for records without one.
    """

    def read_question(number: int, location: str, record: Record) -> tuple[str, int | str, Question]:
        text_names = [name for name in ("text", "question", "query") if name in record]
        question_id = take_question_id(location, record, number)
        text = take_question(location, record, *text_names[:1]) if text_names else prompt
        return location, question_id, Question(question_id, take_text(location, record, "image"), text)

    rows, _ = read_rows(path)
    entries = (read_question(number, *located) for number, located in enumerate(rows, start=1))
    example = 'records {"image": "1.jpg", "question": "What is there?"}'
    return list(index(path, "question_id", entries, example).values())


def read_responses(path: str | Path, images: str | Path | None = None) -> list[Response]:
    """Read descriptions of images, one for each image and question.

    The image is under `image_id` or `image`, the text under `caption`, `text`, `answer` or `response`. `question` or
    `prompt` distinguishes several responses to an image.

    Args:
        path: the answers; thinking and a leading "Assistant:" are removed.
        images: the file of questions, for answers that do not name their image. It has as many records in the same
            order, each with `image_id` or `image`.
    """
    answers = list(records(path))
    questions = answers if images is None else list(records(images))
    if answers and len(questions) != len(answers):
        raise ValueError(
            f"{path} has {len(answers)} answers, {images} has {len(questions)} questions; expected one answer to each "
            "question, in their order"
        )

    def read_response(
        location: str, record: Record, there: str, question: Record
    ) -> tuple[str, tuple[str, ...], Response]:
        # Where both records have an id, they must agree
        ids = [str(one["question_id"]) for one in (record, question) if "question_id" in one]  # a number, or its digits
        if len(set(ids)) > 1:
            raise ValueError(
                f"{location} answers question_id {shorten(record['question_id'])}, but {there} is "
                f"{shorten(question['question_id'])}; expected the answers in the order of the questions"
            )
        text = final_answer(take_text(location, record, "caption", "text", "answer", "response"))
        prompt = next((str(record[name]) for name in ("question", "prompt") if name in record), "")
        text = text.removeprefix("Assistant:").strip()
        # The question's record names the image; it may be the answer's own
        response = Response(take_image_id(there, question, "image_id", "image"), text, prompt)
        return location, (response.image, prompt), response

    entries = (read_response(*answer, *question) for answer, question in zip(answers, questions, strict=True))
    example = 'records {"image_id": 42, "caption": "A dog runs."}'
    return list(index(path, "image and question", entries, example).values())
