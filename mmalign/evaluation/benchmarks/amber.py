"""AMBER: objects in descriptions, and yes/no questions on existence, attributes and relations (arXiv:2311.07397).

Generative, over all descriptions:

    CHAIR = mentions of invented objects / mentions      Cover = true objects that are mentioned / true objects
    Hal   = descriptions with an invented object / all   Cog   = expected hallucinations mentioned / all expected

Discriminative, where **"no" is the positive class**, since a hallucinating model says yes too often:

    precision = right no / all no    recall = right no / true no    F1 = 2 right no / (all no + true no)

Both, where descriptions and answers are in one file, in percent as in the paper's table:

    AMBER Score = (100 - CHAIR + F1) / 2

As in the release (inference.py of https://github.com/junyangwang0410/AMBER), a mention is a noun among the words of
relation.json. It is true if it is one of the image's objects or associated with one in relation.json. It then covers
the first such object alone, so only one of two objects with the same name can be covered. The nine words of
safe_words.txt are mentions but never invented.

Differences from the release: denominators do not begin at 0.001, and F1 is not computed from rounded numbers. Together
they change a metric by about 0.1 points at most. The release does not print the AMBER Score. Two tools of the release
are arguments here, because they need models that this package does not include. `nouns` returns the nouns of a text, by
default `nouns_by_rule`; the release uses NLTK's tagger and lemmatizer. `similar` compares two words; the release asks
for a similarity above 0.8 in spaCy's en_core_web_lg. By default only equal words are similar, so CHAIR and Hal are
higher than published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmalign.data.formats.files import document, records, shorten
from mmalign.evaluation.annotations import Record, index, take_names, take_number, take_text
from mmalign.evaluation.benchmarks.pope import Parse
from mmalign.evaluation.metrics import Metrics, Ratio, Sums, as_columns, as_columns_by_kind, divide, f1, ratio
from mmalign.evaluation.statistics import Values
from mmalign.language.objects import singular, tokens
from mmalign.language.yes_no import final_answer, parse_strict
from mmalign.reading import read_text
from mmalign.resources import resolve

Nouns = Callable[[str], Sequence[str]]
Similar = Callable[[str, str], bool]

SAFE_WORDS = frozenset({"orange", "snack", "line", "camera", "light", "shoe", "sign", "range", "individual"})

_TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
_DIMENSIONS = {
    "all": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
_COUNTS = ("questions", "true no", "said yes", "said no", "right no", "right", "unclear")
_PARTS = {
    "accuracy": ("right", "questions"),
    "precision": ("right no", "said no"),
    "recall": ("right no", "true no"),
    "F1": ("right no", "said no", "true no"),
    "yes rate": ("said yes", "questions"),
    "unclear": ("unclear", "questions"),
}


@dataclass(frozen=True)
class GenerativeItem:
    """The objects of an image, and the hallucinations expected in its descriptions."""

    truth: tuple[str, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class DiscriminativeItem:
    """A yes/no question's kind (existence, state, number, action or relation), and True if "yes" is right."""

    kind: str
    answer: bool


AnyItem = GenerativeItem | DiscriminativeItem


@dataclass(frozen=True)
class Annotations:
    """The benchmark's annotations.

    Attributes:
        items: the annotation of each id.
        associates: the vocabulary: for each word, other words for the same object.
        safe_words: mentions that are never invented.
        images: the image of each id; an id without one is its own group.
    """

    items: Mapping[int, AnyItem]
    associates: Mapping[str, tuple[str, ...]]
    safe_words: Collection[str] = SAFE_WORDS
    images: Mapping[int, str] = field(default_factory=dict)

    def is_yes_no(self, number: object) -> bool:
        """Check whether an id is that of a yes/no question."""
        return isinstance(number, int) and isinstance(self.items.get(number), DiscriminativeItem)


class ObjectMatch(NamedTuple):
    """Vocabulary words in a description, the invented ones, and numbers of covered and expected objects."""

    mentions: tuple[str, ...]
    invented: tuple[str, ...]
    num_covered: int
    num_expected: int


# Vocabulary words that are nouns in a description only after one of _BEFORE_NOUNS; "hot" never is.
_SELDOM_NOUNS = {
    *("can", "leave", "watch", "watches", "drink", "drinks", "support", "supports", "sound", "sounds"),
    *("sailing", "drawing", "painting"),
}
_BEFORE_NOUNS = {
    *("a", "an", "the", "this", "that", "another", "some", "several", "one", "two", "three"),
    *("my", "your", "his", "her", "its", "our", "their"),
}


def nouns_by_rule(text: str) -> list[str]:
    """Return the words of a text, in lower case, without those that are seldom nouns in a description.

    "A man can watch" has neither a can nor a watch, but "the watch" is one. Such a word is a noun only after an
    article, a number or a possessive. Every other word that names an object is taken for that object.
    """
    words = [token for token, _, _ in tokens(text)]
    return [
        word
        for word, previous in zip(words, ["", *words], strict=False)
        if word != "hot" and (word not in _SELDOM_NOUNS or previous in _BEFORE_NOUNS)
    ]


def match_objects(
    text: str,
    item: GenerativeItem,
    annotations: Annotations,
    nouns: Nouns = nouns_by_rule,
    similar: Similar | None = None,
) -> ObjectMatch:
    """Match the words of a description with the objects of its image."""
    vocabulary = {word.lower() for key, others in annotations.associates.items() for word in (key, *others)}
    true, expected = _associated_words(item.truth, annotations), _associated_words(item.expected, annotations)
    mentions, invented, covered, hits = [], [], set[int](), set[int]()
    for noun in nouns(text):
        word = noun.lower() if noun.lower() in vocabulary else singular(noun.lower())
        if word not in vocabulary:
            continue
        mentions.append(word)
        # Safe words are mentions, and never invented
        if word in annotations.safe_words:
            continue
        # Equal words first, then similar ones
        place = _first(word, true, str.__eq__)
        # A word without a true object may name an expected one
        if not place:
            hits |= _first(word, expected, str.__eq__)
            if similar:
                hits |= _first(word, expected, similar)
                place = _first(word, true, similar)
        if not place:
            invented.append(word)
        covered |= place
    return ObjectMatch(tuple(mentions), tuple(invented), len(covered), len(hits))


def score_generative(
    responses: Mapping[int, str], annotations: Annotations, nouns: Nouns = nouns_by_rule, similar: Similar | None = None
) -> Metrics:
    """Return CHAIR, Cover, Hal, Cog and the mean length in words (at white space) of descriptions.

    Args:
        responses: the response to each id; ids of yes/no questions are left out.
        annotations: annotations of these ids.
        nouns: a function that returns the nouns of a text, in order and with repetition.
        similar: a comparison of a word of the text with an annotated one; by default only equal words are similar.

    Raises:
        ValueError: an id is unknown, or none belongs to a description.
    """
    _check_ids(responses, annotations)
    items = {number: item for number in responses if isinstance(item := annotations.items[number], GenerativeItem)}
    # Counts of each description; the metrics are ratios of their sums
    rows = []
    for number, item in items.items():
        match = match_objects(responses[number], item, annotations, nouns, similar)
        rows.append(
            {
                "responses": 1,
                "inventing responses": bool(match.invented),
                "mentions": len(match.mentions),
                "invented mentions": len(match.invented),
                "true objects": len(item.truth),
                "covered objects": match.num_covered,
                "expected objects": len(item.expected),
                "expected objects mentioned": match.num_expected,
                "words per response": len(responses[number].split()),
            }
        )
    ratios: dict[str, Ratio] = {
        "CHAIR": ratio("invented mentions", "mentions"),
        "Cover": ratio("covered objects", "true objects"),
        "Hal": ratio("inventing responses", "responses"),
        "Cog": ratio("expected objects mentioned", "expected objects"),
    }
    groups = _groups(items, annotations)
    columns, errors = as_columns(rows), ("CHAIR", "Hal", "Cog")
    return Metrics("AMBER, generative", tuple(items), groups, columns, ratios, ("words per response",), errors=errors)


def score(responses: Mapping[int, str], annotations: Annotations, parse: Parse = parse_strict) -> list[Metrics]:
    """Return the metrics of the descriptions and of the answers in `responses`, and of both together: [1 or 3]."""
    _check_ids(responses, annotations)
    kinds = {type(annotations.items[number]) for number in responses}
    metrics = [score_generative(responses, annotations)] if GenerativeItem in kinds else []
    if DiscriminativeItem in kinds:
        metrics.append(score_discriminative(responses, annotations, parse))
    return [*metrics, score_both(*metrics)] if len(metrics) == 2 else metrics


def score_both(generative: Metrics, discriminative: Metrics) -> Metrics:
    """Return the AMBER Score of descriptions and answers; its interval is over the images of both."""
    numbers = [len(metrics.keys) for metrics in (generative, discriminative)]
    # First the descriptions, then the answers: each has zeros in the columns of the other
    columns = {name: np.pad(values, (0, numbers[1])) for name, values in generative.columns.items()}
    columns |= {name: np.pad(values, (numbers[0], 0)) for name, values in discriminative.columns.items()}
    chair, f1_of_no = generative.ratios["CHAIR"], discriminative.ratios["all: F1"]
    ratios: dict[str, Ratio] = {"AMBER Score": lambda sums: (1 - chair(sums) + f1_of_no(sums)) / 2}
    keys, groups = generative.keys + discriminative.keys, generative.groups + discriminative.groups
    return Metrics("AMBER", keys, groups, columns, ratios)


def parse_published(answer: str) -> bool | None:
    """Parse exactly "Yes" or "No", as the release does; return None for anything else, which is wrong."""
    return {"Yes": True, "No": False}.get(answer)


def score_discriminative(
    responses: Mapping[int, str], annotations: Annotations, parse: Parse = parse_strict
) -> Metrics:
    """Return accuracy, precision, recall and F1 of "no", yes rate and unclear rate: overall, by dimension and by kind.

    All existence questions ask for absent objects, so their precision is 1 as soon as one answer is right.

    Args:
        responses: the answer to each id; ids of descriptions are left out.
        annotations: annotations of these ids.
        parse: `yes_no.parse_strict`, or `parse_published`; an answer that is neither yes nor no is wrong.

    Raises:
        ValueError: an id is unknown, or none belongs to a yes/no question.
    """
    _check_ids(responses, annotations)
    items = {number: item for number in responses if isinstance(item := annotations.items[number], DiscriminativeItem)}
    present = {item.kind for item in items.values()}
    rows = [(item.kind, _count(item, responses[number], parse)) for number, item in items.items()]
    # Kinds of each dimension that some question has
    kinds = {name: [kind for kind in of_name if kind in present] for name, of_name in _DIMENSIONS.items()}
    ratios: dict[str, Ratio] = {
        f"{dimension}: {name}": partial(_over_kinds, kinds_present, parts)
        for dimension, kinds_present in kinds.items()
        for name, parts in _PARTS.items()
        if kinds_present
    }
    columns, groups = as_columns_by_kind(kinds["all"], rows), _groups(items, annotations)
    headline = ("all: accuracy", "all: F1", "all: yes rate", "all: unclear")
    return Metrics("AMBER, discriminative", tuple(items), groups, columns, ratios, headline=headline)


def _count(item: DiscriminativeItem, answer: str, parse: Parse) -> dict[str, bool]:
    reading, unclear = parse(answer), parse_strict(answer) is None
    no, true_no = reading is False, not item.answer
    values = (True, true_no, reading is True, no, no and true_no, reading is item.answer, unclear)
    return dict(zip(_COUNTS, values, strict=True))


def _over_kinds(kinds: Sequence[str], parts: Sequence[str], sums: Sums) -> Values:
    """Return a ratio (two parts) or an F1 (three parts) of sums over some kinds of question."""
    totals = [np.sum([sums[f"{kind}: {part}"] for kind in kinds], axis=0) for part in parts]
    return f1(*totals) if len(totals) == 3 else divide(*totals)


# ----------------------------------------------------------------------------------------------------------- the files


def read_amber(folder: str | Path) -> Annotations:
    """Read the benchmark's folder `data`: annotations.json, relation.json, safe_words.txt.

    The image of each question comes from query/query_all.json, if there is one.
    """
    place = resolve(folder)
    relations = document(place / "relation.json")
    associates = {word: take_names("relation.json", relations, word) for word in relations}
    path = place / "annotations.json"
    entries = ((at, _id(at, record), _read_item(at, record, associates)) for at, record in records(path))
    items = index(path, "id", entries, "the benchmark's annotations")
    safe_words = read_text(resolve(place / "safe_words.txt"), "expected the benchmark's words, one a line").split()
    # Questions about one image depend on each other
    queries = place / "query" / "query_all.json"
    located = records(queries) if queries.is_file() else ()
    images = {_id(location, record): take_text(location, record, "image") for location, record in located}
    return Annotations(items, associates, frozenset(safe_words), images)


def read_responses(path: str | Path) -> dict[int, str]:
    """Read responses by id: records {"id", "response"}, descriptions and answers in one file or in several.

    As in other benchmarks' files, the id may be called `question_id`, and the response `text` or `answer`.
    """
    entries = (
        (location, _id(location, record), final_answer(take_text(location, record, "response", "text", "answer")))
        for location, record in records(path)
    )
    return index(path, "id", entries, 'records {"id": 1, "response": "A lake in a forest."}')


def _id(location: str, record: Record) -> int:
    return take_number(location, record, "id", "question_id")


def _read_item(location: str, record: Record, associates: Mapping[str, object]) -> AnyItem:
    kind = take_text(location, record, "type")
    if kind == "generative":
        truth, expected = take_names(location, record, "truth"), take_names(location, record, "hallu")
        # Objects are matched by their associates, which an unknown name lacks
        unknown = [name for name in (*truth, *expected) if name not in associates]
        if unknown:
            raise ValueError(f"{location}: {unknown[0]!r} is not in relation.json; use files from the same release")
        return GenerativeItem(truth, expected)
    answer = take_text(location, record, "truth")
    if kind not in _TYPES or answer not in ("yes", "no"):
        raise ValueError(
            f"{location}: type is {shorten(kind)}, truth {shorten(answer)}; expected yes or no, and a type of "
            f"generative, {', '.join(_TYPES)}"
        )
    return DiscriminativeItem(_TYPES[kind], answer == "yes")


def _associated_words(objects: Sequence[str], annotations: Annotations) -> list[tuple[str, int]]:
    """Return pairs of a word and its object's index: associates of all objects first, then the names themselves."""
    associates = [(word.lower(), i) for i, name in enumerate(objects) for word in annotations.associates[name]]
    return associates + [(name.lower(), i) for i, name in enumerate(objects)]


def _first(word: str, associated: Sequence[tuple[str, int]], same: Similar) -> set[int]:
    """Return the index of the first object that a word names; empty if there is none."""
    return set([i for other, i in associated if same(word, other)][:1])


def _groups(numbers: Collection[int], annotations: Annotations) -> tuple[Hashable, ...]:
    return tuple(annotations.images.get(number, number) for number in numbers)


def _check_ids(responses: Mapping[int, str], annotations: Annotations) -> None:
    unknown = [number for number in responses if number not in annotations.items]
    if unknown:
        known = annotations.items
        raise ValueError(
            f"amber: {len(unknown)} of {len(responses)} responses have an id without annotation "
            f"({', '.join(map(str, unknown[:3]))}); expected ids of annotations.json, {min(known, default=0)} to "
            f"{max(known, default=0)}"
        )
