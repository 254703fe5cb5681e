"""CHAIR: mentions of objects that are not in the image (arXiv:1809.02156, section 3).

    CHAIR_i = mentions of invented objects / all mentions of objects
    CHAIR_s = descriptions with an invented object / all descriptions
    recall  = objects of the images that their descriptions mention / all objects of the images

All mentions are counted, as in the release: an invented dog, named twice, is two invented mentions. Recall counts each
object of an image once. Report it with CHAIR, because a model that says nothing invents nothing. An empty description
has no mention, and is one of all descriptions in CHAIR_s. In an image without objects every mention is invented. A
metric with denominator 0 is 0.

The objects of an image come from annotations. For MSCOCO these are the object masks and the mentions of the five human
captions (`read_coco`). The vocabulary is MSCOCO's (`coco_vocabulary`, two variants) or your own (`vocabulary`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.data.formats.files import document, shorten
from mmalign.evaluation.annotations import (
    Record,
    Response,
    check_annotated,
    image_id,
    read_objects,
    take_id,
    take_image_id,
    take_text,
)
from mmalign.evaluation.metrics import Metrics, Ratio, as_columns, ratio
from mmalign.evaluation.statistics import Values
from mmalign.language.objects import Mention, Vocabulary

Truth = Mapping[str, Collection[str]]  # the objects of each image, by its id (`annotations.image_id`)


@dataclass(frozen=True)
class ObjectMatch:
    """The object words of a description: all mentions, the invented ones, and the image's objects among them."""

    mentions: tuple[Mention, ...]
    invented: tuple[Mention, ...]
    present: frozenset[str]


def match_objects(text: str, objects: Collection[str], vocabulary: Vocabulary) -> ObjectMatch:
    """Match the object words of a description with its image's objects, which have the vocabulary's names."""
    mentions = tuple(vocabulary.mentions(text))
    invented = tuple(mention for mention in mentions if mention.object not in objects)
    return ObjectMatch(mentions, invented, frozenset(mention.object for mention in mentions) & frozenset(objects))


def score(responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary) -> Metrics:
    """Return CHAIR_i, CHAIR_s, recall and the mean length in words (at white space) of N descriptions.

    Raises:
        ValueError: there is no response, two answer the same question on one image, an image has no annotation, or an
            annotated object is not in the vocabulary.
    """
    return description_metrics(
        "CHAIR",
        responses,
        count_mentions(responses, truth, vocabulary),
        {"CHAIR_i": ratio("invented mentions", "mentions"), "CHAIR_s": ratio("inventing responses", "responses")},
        headline=("CHAIR_s", "CHAIR_i", "recall", "words per response"),
    )


def description_metrics(
    benchmark: str,
    responses: Sequence[Response],
    columns: Mapping[str, Values],
    rates: Mapping[str, Ratio],
    headline: tuple[str, ...] = (),
) -> Metrics:
    """Return `rates`, recall and length of N descriptions, from the columns of `count_mentions`."""
    keys = tuple((response.image, response.question) for response in responses)
    images = tuple(response.image for response in responses)
    ratios = {**rates, "recall": ratio("found objects", "true objects")}
    return Metrics(benchmark, keys, images, columns, ratios, ("words per response",), headline, errors=tuple(rates))


def count_mentions(
    responses: Sequence[Response], truth: Truth, vocabulary: Vocabulary, *, distinct: bool = False
) -> dict[str, Values]:
    """Return the values [N] of each count; `distinct` counts each word of a response once.

    Raises:
        ValueError: an image has no annotation, or an annotated object is not in the vocabulary.
    """
    check_annotated("truth", [response.image for response in responses], truth)
    rows = []
    for response in responses:
        objects = truth[response.image]
        unknown = sorted(set(objects) - set(vocabulary.objects))
        if unknown:
            raise ValueError(
                f"truth: image {response.image} has the object {unknown[0]!r}, which the vocabulary "
                f"({', '.join(vocabulary.objects[:3])}, ...) does not have; read the annotations with the vocabulary "
                "used for scoring"
            )
        match = match_objects(response.text, objects, vocabulary)
        # By words: two words for one object are distinct
        words, invented_words = [mention.word for mention in match.mentions], [m.word for m in match.invented]
        rows.append(
            {
                "responses": 1,
                "responses with objects": bool(words),
                "inventing responses": bool(invented_words),
                "mentions": len(set(words) if distinct else words),
                "invented mentions": len(set(invented_words) if distinct else invented_words),
                "true objects": len(set(objects)),
                "found objects": len(match.present),
                "words per response": len(response.text.split()),
            }
        )
    return as_columns(rows)


def read_truth(path: str | Path, vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """Read the objects of each image from records {"image", "objects"}, and return the vocabulary's names for them.

    Raises:
        ValueError: an image is repeated, or an object is not a word of the vocabulary.
    """
    truth: dict[str, frozenset[str]] = {}
    for image, names in read_objects(path).items():
        key = image_id(image)
        if key in truth:
            raise ValueError(f"{path}: duplicate image {image}, as {key}; expected one record for each")
        try:
            truth[key] = frozenset(map(vocabulary.object_of, names))
        except ValueError as error:
            raise ValueError(f"{path}: {image}: {error}") from None
    return truth


def read_coco(
    instances: Iterable[str | Path],
    captions: Iterable[str | Path],
    vocabulary: Vocabulary,
    images: Collection[str] | None = None,
) -> dict[str, frozenset[str]]:
    """Read the objects of MSCOCO's images: those with a mask, and those that a human caption mentions.

    CHAIR uses both 2014 splits: instances_train2014.json and instances_val2014.json, captions_train2014.json and
    captions_val2014.json.

    Args:
        instances: files with `images`, `categories` and `annotations` (`image_id`, `category_id`).
        captions: files with `images` and `annotations` (`image_id`, `caption`).
        vocabulary: the objects' names.
        images: ids to read, all by default; matching the words of 600,000 captions takes minutes.

    Raises:
        ValueError: a file is invalid, or a category is not a word of the vocabulary.
    """
    truth: dict[str, set[str]] = {}
    # Objects with a mask
    for path in instances:
        file = document(path)
        objects = {
            take_id(at, category, "id"): vocabulary.object_of(take_text(at, category, "name"), at)
            for at, category in _coco_records(path, file, "categories")
        }
        for at, image, annotation in _coco_annotations(path, file, truth):
            category = take_id(at, annotation, "category_id")
            if category not in objects:
                raise ValueError(f"{at}: category_id is {shorten(category)}; expected one of `categories`")
            truth[image].add(objects[category])
    # Objects mentioned by a caption
    for path in captions:
        for at, image, annotation in _coco_annotations(path, document(path), truth):
            if images is None or image in images:
                truth[image].update(
                    mention.object for mention in vocabulary.mentions(take_text(at, annotation, "caption"))
                )
    return {image: frozenset(objects) for image, objects in truth.items() if images is None or image in images}


def _coco_annotations(path: str | Path, file: Record, truth: dict[str, set[str]]) -> Iterator[tuple[str, str, Record]]:
    """Yield each annotation with its location and image; add all images to `truth`, also those without one."""
    for at, image in _coco_records(path, file, "images"):
        truth.setdefault(take_image_id(at, image, "id"), set())
    for at, annotation in _coco_records(path, file, "annotations"):
        image_of = take_image_id(at, annotation, "image_id")
        truth.setdefault(image_of, set())
        yield at, image_of, annotation


def _coco_records(path: str | Path, file: Record, part: str) -> list[tuple[str, Record]]:
    """Return the records of a part of MSCOCO's annotations, with their locations."""
    entries = file.get(part)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{path}: {part} is {shorten(entries)}; expected a list of records, as in MSCOCO's annotations"
        )
    return [(f"{path}: {part} {number}", entry) for number, entry in enumerate(entries, start=1)]
