"""AMBER: objects in descriptions, and yes/no questions on existence, attributes and relations (arXiv:2311.07397).

Generative, over all descriptions:

    CHAIR = mentions of invented objects / mentions      Cover = true objects that are mentioned / true objects
    Hal   = descriptions with an invented object / all   Cog   = expected hallucinations mentioned / all expected

Discriminative, where **"no" is the positive class**, since a hallucinating model says yes too often:

    precision = right no / all no    recall = right no / true no    F1 = 2 right no / (all no + true no)

As in the release (inference.py of https://github.com/junyangwang0410/AMBER): a mention is a noun among the words of
relation.json; it is true if it is one of the image's objects or stands beside one in relation.json, and then covers
the first such object alone, so of two objects of one name only one can be covered. The nine words of safe_words.txt
count as mentions but never as invented. What differs: denominators do not begin at 0.001, F1 is not computed from
rounded numbers (together about 0.1 points at most), and two tools of the release are arguments here, because they need
models that this package does not carry. `nouns` finds the nouns of a text (the release: NLTK's tagger and lemmatizer),
by default `nouns_by_rule`. `similar` says whether two words mean the same (the release: similarity above 0.8 in spaCy's
en_core_web_lg), by default only equal words do, so that CHAIR and Hal come out higher than published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmalign.evaluation.answer_files import document, records, shown, take, take_names, take_text
from mmalign.evaluation.counts import Metrics, Ratio, as_columns, divide, f1, ratio
from mmalign.evaluation.intervals import Values
from mmalign.evaluation.pope import Parse, parse_strict
from mmalign.language.objects import singular, tokens
from mmalign.share import resolve

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


@dataclass(frozen=True)
class Description:
    """What is in an image, and what models are expected to invent there."""

    truth: tuple[str, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A yes/no question: existence, state, number, action or relation, and whether "yes" is right."""

    kind: str
    answer: bool


@dataclass(frozen=True)
class Amber:
    """The benchmark's files.

    Attributes:
        items: from an id to what is asked or described there.
        associates: the vocabulary: from a word to others that may stand for it.
        safe_words: mentions that are never invented.
        images: from an id to its image, which its questions share; where it is not given, each id is its own.
    """

    items: Mapping[int, Description | Claim]
    associates: Mapping[str, tuple[str, ...]]
    safe_words: Collection[str] = SAFE_WORDS
    images: Mapping[int, str] = field(default_factory=dict)


class Found(NamedTuple):
    """The words of the vocabulary in a description, those invented, and how many listed objects it mentions."""

    mentions: tuple[str, ...]
    invented: tuple[str, ...]
    covered: int
    expected: int


# Words of the vocabulary that are nouns in a description only after one of the following; "hot" never is.
_SELDOM_NOUNS = {
    *("can", "leave", "watch", "watches", "drink", "drinks", "support", "supports", "sound", "sounds"),
    *("sailing", "drawing", "painting"),
}
_BEFORE_NOUNS = {
    *("a", "an", "the", "this", "that", "another", "some", "several", "one", "two", "three"),
    *("my", "your", "his", "her", "its", "our", "their"),
}


def nouns_by_rule(text: str) -> list[str]:
    """The words of a text, in lower case, without those that are seldom nouns in a description.

    "A man can watch" has neither a can nor a watch, "the watch" is one: such a word counts after an article, a number
    or a possessive alone. Every other word that names an object is taken for that object.
    """
    found = [token for token, _, _ in tokens(text)]
    before = ["", *found]
    return [
        word
        for word, previous in zip(found, before, strict=False)
        if word != "hot" and (word not in _SELDOM_NOUNS or previous in _BEFORE_NOUNS)
    ]


def find(
    text: str, item: Description, amber: Amber, nouns: Nouns = nouns_by_rule, similar: Similar | None = None
) -> Found:
    """What a description mentions, invents and covers; see the head of this file."""
    vocabulary = _vocabulary(amber)
    true, expected = _stand_ins(item.truth, amber), _stand_ins(item.expected, amber)
    mentions, invented, covered, hit = [], [], set[int](), set[int]()
    for noun in nouns(text):
        word = noun.lower() if noun.lower() in vocabulary else singular(noun.lower())
        if word not in vocabulary:
            continue
        mentions.append(word)
        if word in amber.safe_words:
            continue
        place = next((at for other, at in true if other == word), None)
        if place is None:
            hit.update(_first(word, expected, str.__eq__))
            if similar:
                hit.update(_first(word, expected, similar))
                place = next(iter(_first(word, true, similar)), None)
        if place is None:
            invented.append(word)
        else:
            covered.add(place)
    return Found(tuple(mentions), tuple(invented), len(covered), len(hit))


def score_generative(
    responses: Mapping[int, str], amber: Amber, nouns: Nouns = nouns_by_rule, similar: Similar | None = None
) -> Metrics:
    """CHAIR, Cover, Hal, Cog and the mean length in words (at white space) of descriptions.

    Args:
        responses: from an id to what the model said; ids of yes/no questions are left out.
        amber: the benchmark's files.
        nouns: the nouns of a text, in order and with repetition.
        similar: whether two words, of the text and of the annotations, mean the same; equal words alone, if not given.

    Raises:
        ValueError: an id is unknown, or none is a description's.
    """
    _check_ids(responses, amber)
    items = {number: item for number in responses if isinstance(item := amber.items[number], Description)}
    rows = []
    for number, item in items.items():
        found = find(responses[number], item, amber, nouns, similar)
        rows.append(
            {
                "responses": 1,
                "inventing responses": bool(found.invented),
                "mentions": len(found.mentions),
                "invented mentions": len(found.invented),
                "true objects": len(item.truth),
                "covered objects": found.covered,
                "expected objects": len(item.expected),
                "expected objects mentioned": found.expected,
                "words per response": len(responses[number].split()),
            }
        )
    ratios: dict[str, Ratio] = {
        "CHAIR": ratio("invented mentions", "mentions"),
        "Cover": ratio("covered objects", "true objects"),
        "Hal": ratio("inventing responses", "responses"),
        "Cog": ratio("expected objects mentioned", "expected objects"),
    }
    return Metrics(
        "AMBER, generative", tuple(items), _groups(items, amber), as_columns(rows), ratios, ("words per response",)
    )


def score(responses: Mapping[int, str], amber: Amber) -> list[Metrics]:
    """Descriptions and answers together: what was counted in those that there are, descriptions first.

    Raises:
        ValueError: an id is unknown.
    """
    _check_ids(responses, amber)
    kinds = {type(amber.items[number]) for number in responses}
    scored = [score_generative(responses, amber)] if Description in kinds else []
    return [*scored, score_discriminative(responses, amber)] if Claim in kinds else scored


def parse_published(answer: str) -> bool | None:
    """Yes or no as the release reads it: exactly "Yes" or "No"; everything else is neither, and wrong."""
    return {"Yes": True, "No": False}.get(answer)


def score_discriminative(responses: Mapping[int, str], amber: Amber, parse: Parse = parse_strict) -> Metrics:
    """Accuracy, precision, recall and F1 of "no", and the yes rate: of all questions, of dimensions and of their kinds.

    All existence questions are of absent objects, so their precision is 1 as soon as one is right.

    Args:
        responses: from an id to the answer; ids of descriptions are left out.
        amber: the benchmark's files.
        parse: `pope.parse_strict`, or `parse_published`; an answer that is neither yes nor no is wrong.

    Raises:
        ValueError: an id is unknown, or none is a question's.
    """
    _check_ids(responses, amber)
    claims = {number: item for number in responses if isinstance(item := amber.items[number], Claim)}
    said = {number: parse(responses[number]) for number in claims}
    counted = {
        "questions": [1.0 for _ in claims],
        "true no": [float(not claim.answer) for claim in claims.values()],
        "said yes": [float(said[number] is True) for number in claims],
        "said no": [float(said[number] is False) for number in claims],
        "right no": [float(said[number] is False and not claim.answer) for number, claim in claims.items()],
        "right": [float(said[number] is claim.answer) for number, claim in claims.items()],
    }
    columns: dict[str, Values] = {}
    for kind in _DIMENSIONS["all"]:
        of_kind = np.array([claim.kind == kind for claim in claims.values()], dtype=np.float64)
        if of_kind.any():
            columns.update({f"{kind}: {what}": of_kind * np.array(values) for what, values in counted.items()})
    ratios: dict[str, Ratio] = {}
    for dimension, kinds in _DIMENSIONS.items():
        there = tuple(kind for kind in kinds if f"{kind}: questions" in columns)
        if there:
            ratios.update({f"{dimension}: {name}": _over(there, *parts) for name, parts in _MEASURES.items()})
    headline = ("all: accuracy", "all: F1", "all: yes rate")
    return Metrics("AMBER, discriminative", tuple(claims), _groups(claims, amber), columns, ratios, headline=headline)


def read_amber(folder: str | Path) -> Amber:
    """The benchmark from its folder `data`: annotations.json, relation.json, safe_words.txt, and where it is there
    query/query_all.json, which says which questions share an image.

    Raises:
        ValueError: a file is missing or bad; the message says where.
    """
    place = resolve(folder)
    associates = {
        word: tuple(take_names("relation.json", {word: others}, word))
        for word, others in document(place / "relation.json").items()
    }
    items: dict[int, Description | Claim] = {}
    for where, record in records(place / "annotations.json"):
        number = _id(where, record)
        if number in items:
            raise ValueError(f"{where}: id {number} stands there twice; expected another for each record")
        items[number] = _item(where, record, associates)
    safe = resolve(place / "safe_words.txt").read_text(encoding="utf-8").split()
    queries = place / "query" / "query_all.json"
    images = {}
    if queries.is_file():
        images = {_id(where, record): take_text(where, record, "image") for where, record in records(queries)}
    return Amber(items, associates, frozenset(safe), images)


def read_responses(path: str | Path) -> dict[int, str]:
    """The responses by id: records {"id", "response"}, descriptions and answers in one file or in several.

    As in other benchmarks' files the id may be called `question_id`, and the response `text` or `answer`.

    Raises:
        ValueError: the file is bad or empty, or an id stands there twice.
    """
    responses: dict[int, str] = {}
    for where, record in records(path):
        number = _id(where, record)
        if number in responses:
            raise ValueError(f"{where}: id {number} is answered twice; expected one response to each")
        responses[number] = take_text(where, record, "response", "text", "answer")
    if not responses:
        raise ValueError(f'{path} is empty; expected records {{"id": 1, "response": "A lake in a forest."}}')
    return responses


_MEASURES = {
    "accuracy": ("right", "questions"),
    "precision": ("right no", "said no"),
    "recall": ("right no", "true no"),
    "F1": ("right no", "said no", "true no"),
    "yes rate": ("said yes", "questions"),
}


def _over(kinds: Sequence[str], *parts: str) -> Ratio:
    """A ratio (two parts) or an F1 (three), of sums over some kinds of question."""

    def share(sums: Mapping[str, Values]) -> Values:
        totals = [np.sum([sums[f"{kind}: {part}"] for kind in kinds], axis=0) for part in parts]
        return f1(*totals) if len(totals) == 3 else divide(*totals)

    return share


def _vocabulary(amber: Amber) -> set[str]:
    return {word.lower() for key, others in amber.associates.items() for word in (key, *others)}


def _stand_ins(objects: Sequence[str], amber: Amber) -> list[tuple[str, int]]:
    """The words for some objects with the object's place: all associates first, then the objects, as in the release."""
    associates = [(word.lower(), at) for at, name in enumerate(objects) for word in amber.associates[name]]
    return associates + [(name.lower(), at) for at, name in enumerate(objects)]


def _first(word: str, stand_ins: Sequence[tuple[str, int]], same: Similar) -> list[int]:
    """The place of the first object that a word stands for; empty if there is none."""
    return [at for other, at in stand_ins if same(word, other)][:1]


def _groups(numbers: Collection[int], amber: Amber) -> tuple[Hashable, ...]:
    return tuple(amber.images.get(number, number) for number in numbers)


def _check_ids(responses: Mapping[int, str], amber: Amber) -> None:
    unknown = [number for number in responses if number not in amber.items]
    if unknown:
        raise ValueError(
            f"amber: {len(unknown)} of {len(responses)} responses have an id without annotation "
            f"({', '.join(map(str, unknown[:3]))}); expected ids of annotations.json, {min(amber.items, default=0)} to "
            f"{max(amber.items, default=0)}"
        )


def _id(where: str, record: Mapping[str, object]) -> int:
    number = take(where, record, "id", "question_id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{where}: id is {shown(number)}; expected a whole number")
    return number


def _item(where: str, record: Mapping[str, object], associates: Mapping[str, object]) -> Description | Claim:
    kind = take_text(where, record, "type")
    if kind == "generative":
        lists = [tuple(take_names(where, record, name)) for name in ("truth", "hallu")]
        unknown = [name for names in lists for name in names if name not in associates]
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r} is no word of relation.json; expected the files of one release")
        return Description(*lists)
    answer = take_text(where, record, "truth")
    if kind not in _TYPES or answer not in ("yes", "no"):
        raise ValueError(
            f"{where}: type is {shown(kind)}, truth {shown(answer)}; expected yes or no, and a type of generative, "
            f"{', '.join(_TYPES)}"
        )
    return Claim(_TYPES[kind], answer == "yes")
