"""Files of answers and annotations as people have them: JSON lists, JSON lines (also in files named .json), one record
for each response or image.

Image ids come as numbers (42), digits ("42") or the file names of MSCOCO ("COCO_val2014_000000000042.jpg"); all three
are "42" here, and any other name stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmalign.share import resolve

Record = dict[str, Any]
Named = TypeVar("Named")

_COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)


@dataclass(frozen=True)
class Response:
    """What a model said of an image; `question` tells several responses to one image apart."""

    image: str
    text: str
    question: str = ""


def image_id(value: object) -> str:
    """The id of an image, the same for 42, "42" and "COCO_val2014_000000000042.jpg"."""
    text = str(value)
    coco = _COCO_NAME.fullmatch(text)
    digits = coco.group(1) if coco else text
    return str(int(digits)) if digits.isascii() and digits.isdigit() else text


def records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Every record of a file, with where it stands (from 1).

    A dictionary {"imgToEval": {id: record}}, as captioning toolkits write it, holds its records there.

    Raises:
        ValueError: there is no such file, it is not JSON or JSON lines, or a record is no {...}.
    """
    file = resolve(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected JSON, or JSON lines, in UTF-8") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{file.name} is not JSON ({error}); expected a list of records [{{...}}]") from error
        numbered = _lines(file.name, text)
    else:
        numbered = _entries(file.name, content)
    for where, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {shown(record)}; expected a record {{...}}")
        yield where, record


def document(path: str | Path) -> Record:
    """The one JSON dictionary that a file is.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    file = resolve(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected one dictionary {{...}}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is {shown(content)}; expected one dictionary {{...}}")
    return content


def take(where: str, record: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of these names that a record has.

    Raises:
        ValueError: it has none of them.
    """
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"{where} has {shown(list(record))}; expected {' or '.join(map(repr, names))}")


def take_text(where: str, record: Mapping[str, Any], *names: str) -> str:
    """As `take`, and a string, which may be empty.

    Raises:
        ValueError: the record has none of the names, or what is there is no string.
    """
    value = take(where, record, *names)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {' or '.join(names)} is {shown(value)}; expected a string (empty where no answer)")
    return value


def take_id(where: str, record: Mapping[str, Any], *names: str) -> str:
    """As `take`, and the id of an image; see `image_id`.

    Raises:
        ValueError: the record has none of the names, or what is there is neither a number nor a string.
    """
    value = take(where, record, *names)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {' or '.join(names)} is {shown(value)}; expected a number or a file name")
    return image_id(value)


def take_names(where: str, record: Mapping[str, Any], name: str) -> list[str]:
    """As `take`, and a list of strings, which may be empty.

    Raises:
        ValueError: the record has no such name, or what is there is no list of strings.
    """
    value = take(where, record, name)
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f'{where}: {name} is {shown(value)}; expected a list of names, such as ["dog", "hot dog"]')
    return value


def read_objects(path: str | Path) -> dict[str, tuple[str, ...]]:
    """From each image to its objects, in the order of the file: records {"image", "objects"}, as POPE has them.

    The images keep the names that the file gives them; an object named twice is kept once. Other keys are ignored.

    Raises:
        ValueError: the file is empty or no such file, or an image stands in it twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for where, record in records(path):
        image = str(take(where, record, "image", "image_id"))
        if image in found:
            raise ValueError(f"{where}: {image} is annotated twice; expected one record with all objects of an image")
        found[image] = tuple(dict.fromkeys(take_names(where, record, "objects")))
    if not found:
        raise ValueError(f'{path} is empty; expected records {{"image": "1.jpg", "objects": ["dog", "ball"]}}')
    return found


def read_responses(path: str | Path, images: str | Path | None = None) -> list[Response]:
    """Descriptions of images: records with the image under `image_id` or `image` and the text under `caption`, `text`,
    `answer` or `response`; `question` or `prompt` tells several responses to an image apart.

    Args:
        path: the answers. A leading "Assistant:" is no part of an answer.
        images: the file of questions, where the answers do not name their image: as many records in the same order,
            each with `image_id` or `image`.

    Raises:
        ValueError: a file is bad or empty, the two do not match, or an image and question stand there twice.
    """
    answers = list(records(path))
    if not answers:
        raise ValueError(f'{path} is empty; expected records {{"image_id": 42, "caption": "A dog runs."}}')
    asked = answers if images is None else list(records(images))
    if len(asked) != len(answers):
        raise ValueError(
            f"{path} has {len(answers)} answers, {images} has {len(asked)} questions; expected one answer to each "
            "question, in their order"
        )
    responses: dict[tuple[str, str], Response] = {}
    for (where, record), (there, question) in zip(answers, asked, strict=True):
        if "question_id" in record and record["question_id"] != question.get("question_id", record["question_id"]):
            raise ValueError(
                f"{where} answers question_id {shown(record['question_id'])}, but {there} is "
                f"{shown(question['question_id'])}; expected the answers in the order of the questions"
            )
        text = take_text(where, record, "caption", "text", "answer", "response").strip().removeprefix("Assistant:")
        prompt = next((str(record[name]) for name in ("question", "prompt") if name in record), "")
        response = Response(take_id(there, question, "image_id", "image"), text.strip(), prompt)
        if (response.image, prompt) in responses:
            raise ValueError(
                f"{where}: image {response.image} is answered twice; expected one response to each image, or different "
                "questions under 'question'"
            )
        responses[response.image, prompt] = response
    return list(responses.values())


def check_ids(what: str, came: Sequence[str], known: Mapping[str, Named]) -> None:
    """That every id is known.

    Raises:
        ValueError: one is not.
    """
    unknown = sorted({name for name in came if name not in known})
    if unknown:
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"{what}: {len(unknown)} of {len(set(came))} images have no annotation ({some}; annotated are "
            f"{', '.join(list(known)[:3])}, ...); expected an annotation for every image, an empty one where there is "
            "no object"
        )


def shown(value: object) -> str:
    """A value for an error message, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entries(name: str, content: object) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        nested = content.get("imgToEval")
        if isinstance(nested, dict):
            yield from ((f"{name}: imgToEval {key}", record) for key, record in nested.items())
            return
        content = [content]  # JSON lines with a single line
    if not isinstance(content, list):
        raise ValueError(f"{name} is {shown(content)}; expected a list of records [{{...}}], or one record a line")
    yield from ((f"{name}: entry {number}", record) for number, record in enumerate(content, start=1))


def _lines(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{name}: line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{name}: line {number} is not JSON ({error}); expected one record {{...}} a line"
                ) from error
