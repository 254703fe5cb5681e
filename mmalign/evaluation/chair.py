"""CHAIR: how many of the objects that a description mentions are not in the image (arXiv:1809.02156, section 3).

    CHAIR_i = mentions of invented objects / all mentions of objects
    CHAIR_s = descriptions with an invented object / all descriptions
    recall  = objects of the images that their descriptions mention / all objects of the images

Every mention counts, as in the release: a dog that is not there, named twice, is two invented mentions. Recall counts
each object of an image once. It stands beside CHAIR always, because a model that says nothing invents nothing. An empty
description mentions nothing and counts in CHAIR_s; in an image without objects every mention is invented. Where there
is nothing to divide by, a measure is 0.

What is in an image comes from annotations; for MSCOCO these are the object masks and what the five human captions
mention (`read_coco`). The vocabulary is MSCOCO's (`coco_vocabulary`, two variants) or one of your own (`vocabulary`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.evaluation.answer_files import (
    Response,
    check_ids,
    document,
    image_id,
    read_objects,
    shown,
    take,
    take_id,
    take_text,
)
from mmalign.evaluation.counts import Metrics, as_columns, ratio
from mmalign.evaluation.intervals import Values
from mmalign.language.objects import Mention, Vocabulary

Truth = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Judgement:
    """The object words of one description: all, those of objects that are not in the image, and the objects found."""

    mentions: tuple[Mention, ...]
    invented: tuple[Mention, ...]
    found: frozenset[str]


def judge(text: str, objects: Collection[str], vocabulary: Vocabulary) -> Judgement:
    """Compare a description with the objects of its image, which are names of the vocabulary's objects."""
    mentions = tuple(vocabulary.mentions(text))
    invented = tuple(mention for mention in mentions if mention.object not in objects)
    return Judgement(mentions, invented, frozenset(mention.object for mention in mentions) & frozenset(objects))


def score(responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary) -> Metrics:
    """CHAIR_i, CHAIR_s, recall and the mean length in words (at white space) of N descriptions.

    Args:
        responses: [N]; several to one image are told apart by their question.
        truth: from an image's id (see `answer_files.image_id`) to its objects, by the vocabulary's names.
        vocabulary: which objects there are, and the words for them.

    Raises:
        ValueError: there is no response, two are to the same image and question, an image has no annotation, or an
            annotated object is not the vocabulary's.
    """
    return Metrics(
        "CHAIR",
        tuple((response.image, response.question) for response in responses),
        tuple(response.image for response in responses),
        tally(responses, truth, vocabulary),
        {
            "CHAIR_i": ratio("invented mentions", "mentions"),
            "CHAIR_s": ratio("inventing responses", "responses"),
            "recall": ratio("found objects", "true objects"),
        },
        ("words per response",),
        ("CHAIR_s", "CHAIR_i", "recall", "words per response"),
    )


def tally(
    responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary, *, distinct: bool = False
) -> dict[str, Values]:
    """From the name of a count to its values [N]; `distinct` counts each word of a response once.

    Raises:
        ValueError: as `score`.
    """
    check_ids("truth", [response.image for response in responses], truth)
    rows = []
    for response in responses:
        objects = truth[response.image]
        strange = sorted(set(objects) - set(vocabulary.objects))
        if strange:
            raise ValueError(
                f"truth: image {response.image} has the object {strange[0]!r}, which the vocabulary "
                f"({', '.join(vocabulary.objects[:3])}, ...) does not name so; read the annotations with the "
                "vocabulary that is to score them"
            )
        judged = judge(response.text, objects, vocabulary)
        mentions, invented = (
            {mention.word for mention in some} if distinct else some for some in (judged.mentions, judged.invented)
        )
        rows.append(
            {
                "responses": 1,
                "responses with objects": bool(mentions),
                "inventing responses": bool(invented),
                "mentions": len(mentions),
                "invented mentions": len(invented),
                "true objects": len(set(objects)),
                "found objects": len(judged.found),
                "words per response": len(response.text.split()),
            }
        )
    return as_columns(rows)


def read_truth(path: str | Path, vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """The objects of each image from records {"image", "objects"}, by the vocabulary's names.

    Raises:
        ValueError: the file is bad, or an object is no word of the vocabulary; the message says where.
    """
    truth: dict[str, frozenset[str]] = {}
    for image, names in read_objects(path).items():
        key = image_id(image)
        if key in truth:
            raise ValueError(f"{path}: {image} is annotated twice, as {key}; expected one record for an image")
        truth[key] = _objects(f"{path}: {image}", names, vocabulary)
    return truth


def read_coco(
    instances: Iterable[str | Path],
    captions: Iterable[str | Path],
    vocabulary: Vocabulary,
    images: Collection[str] | None = None,
) -> dict[str, frozenset[str]]:
    """The objects of MSCOCO's images: those with a mask, and those that a human caption mentions.

    CHAIR takes both of the 2014 splits: instances_train2014.json and instances_val2014.json, captions_train2014.json
    and captions_val2014.json.

    Args:
        instances: files with `images`, `categories` and `annotations` (`image_id`, `category_id`).
        captions: files with `images` and `annotations` (`image_id`, `caption`).
        vocabulary: whose names the objects get.
        images: ids to keep (all, if not given): matching the words of 600,000 captions takes minutes.

    Raises:
        ValueError: a file is bad, or a category is no word of the vocabulary.
    """
    truth: dict[str, set[str]] = defaultdict(set)
    for path in instances:
        file = _coco_file(path, "images", "categories", "annotations")
        names = {
            take(f"{path}: categories", category, "id"): take_text(f"{path}: categories", category, "name")
            for category in file["categories"]
        }
        objects = {key: vocabulary.object_of(name) for key, name in names.items()}
        _add_images(path, file, truth)
        for number, annotation in enumerate(file["annotations"], start=1):
            where = f"{path}: annotation {number}"
            category = take(where, annotation, "category_id")
            if category not in objects:
                raise ValueError(f"{where}: category_id is {shown(category)}; expected one of `categories`")
            truth[take_id(where, annotation, "image_id")].add(objects[category])
    for path in captions:
        file = _coco_file(path, "images", "annotations")
        _add_images(path, file, truth)
        for number, annotation in enumerate(file["annotations"], start=1):
            where = f"{path}: annotation {number}"
            image = take_id(where, annotation, "image_id")
            if images is None or image in images:
                mentions = vocabulary.mentions(take_text(where, annotation, "caption"))
                truth[image].update(mention.object for mention in mentions)
    return {image: frozenset(found) for image, found in truth.items() if images is None or image in images}


def _coco_file(path: str | Path, *parts: str) -> dict[str, list[dict[str, object]]]:
    file = document(path)
    for part in parts:
        if not isinstance(file.get(part), list) or not all(isinstance(entry, dict) for entry in file[part]):
            raise ValueError(
                f"{path}: {part} is {shown(file.get(part))}; expected a list of records, as MSCOCO's annotations have"
            )
    return file


def _add_images(path: str | Path, file: Mapping[str, list[dict[str, object]]], truth: dict[str, set[str]]) -> None:
    """Images without any annotation are images too: nothing is in them."""
    for number, image in enumerate(file["images"], start=1):
        truth[take_id(f"{path}: image {number}", image, "id")].update()


def _objects(where: str, names: Iterable[str], vocabulary: Vocabulary) -> frozenset[str]:
    try:
        return frozenset(map(vocabulary.object_of, names))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
