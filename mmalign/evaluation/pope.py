"""POPE: yes/no questions on whether an object is in the image (arXiv:2305.10355).

Half of the questions ask for objects that are there. The other half ask for absent ones, and how these are chosen makes
three splits: at random, the most popular of all images first, or adversarially, those that most often stand beside the
object of the question before. "Yes" is the positive class:

    accuracy = right answers / questions          precision = right yes / all yes
    recall   = right yes / true yes               F1 = 2 right yes / (all yes + true yes)

Papers give the mean over the splits of F1 or of accuracy, so both are here. The yes rate shows a model that says yes to
everything. An answer with neither a yes nor a no counts as unclear, however it is parsed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mmalign.draws import Draws
from mmalign.evaluation.answer_files import records, shown, take, take_text
from mmalign.evaluation.counts import Metrics, Ratio, Sums, f1, ratio
from mmalign.evaluation.intervals import Values

Split = Literal["random", "popular", "adversarial"]
Parse = Callable[[str], bool | None]

SPLITS: tuple[Split, ...] = get_args(Split)
TEMPLATE = "Is there {} in the image?"

_SENTENCE_END = re.compile(r"[.!?\n]")
_NO = {"no", "not", "nope", "cannot", "none", "nothing", "never", "neither", "without"}
_AFFIRMS = re.compile(r"(there (is|are|was|were)|there's|i (can |do )?see)\b")


@dataclass(frozen=True)
class Question:
    """A question about an image, and whether "yes" is right."""

    id: int
    image: str
    text: str
    answer: bool


def build(
    images: Mapping[str, Sequence[str]],
    split: Split,
    *,
    num_images: int | None = None,
    objects_per_image: int = 3,
    names: Sequence[str] | None = None,
    company: Mapping[str, Sequence[str]] | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[Question]:
    """The questions of a split: for each image, an object that is there and one that is not, in turn.

    The objects that are there are an image's first ones. An absent one is never asked for twice of an image. Popularity
    and company are counted over the images that are asked about, as in the release; among equals, what came first goes
    first. Where no object that stands beside the last one is left, a random one is asked for. Random choices are keyed
    by the image's name, so that other images do not change them.

    Args:
        images: from an image to its objects (`answer_files.read_objects`); those with fewer than `objects_per_image`
            are left out. The paper's are the objects of MSCOCO's masks and captions.
        split: how absent objects are chosen.
        num_images: how many images are drawn at random (500 in the paper), all if not given.
        objects_per_image: questions of either kind per image (3 in the paper).
        names: the objects that may be asked for; those of the chosen images, if not given.
        company: for each object those that most often stand beside it, for a world in which that is known; counted
            over the chosen images, if not given.
        template: the question, with {} for "a dog" or "an apple".
        seed: of the random choices.

    Raises:
        ValueError: the split is unknown, the template has no place for an object, there are too few images, or too few
            absent objects to ask for.
    """
    if split not in SPLITS:
        raise ValueError(f"pope: {split!r} is no split; expected one of {', '.join(SPLITS)}")
    if "{}" not in template:
        raise ValueError(f"pope: the template {template!r} has no {{}}; expected one in the place of 'a dog'")
    chosen = _choose(images, num_images, objects_per_image, seed)
    popularity = Counter(name for objects in chosen.values() for name in objects)
    beside = _company(chosen) if company is None and split == "adversarial" else company or {}
    candidates = list(dict.fromkeys(names)) if names is not None else list(popularity)
    by_popularity = sorted(candidates, key=lambda name: -popularity[name])
    questions: list[Question] = []
    for image, objects in chosen.items():
        asked = set(objects)
        keys = Draws(seed).uniform([_row(image)], (len(candidates),), "pope: absent object")[0].tolist()
        at_random = [name for _, name in sorted(zip(keys, candidates, strict=True))]
        for present in objects[:objects_per_image]:
            ranked = {
                "random": at_random,
                "popular": by_popularity,
                "adversarial": [name for name in beside.get(present, ()) if name in candidates] + at_random,
            }[split]
            absent = next((name for name in ranked if name not in asked), None)
            if absent is None:
                raise ValueError(
                    f"pope: image {image} has {len(objects)} of {len(candidates)} objects, so there are not "
                    f"{objects_per_image} absent ones; give more objects under `names`, or fewer `objects_per_image`"
                )
            asked.add(absent)
            for name, answer in ((present, True), (absent, False)):
                questions.append(Question(len(questions) + 1, image, template.format(_with_article(name)), answer))
    return questions


def parse_published(answer: str) -> bool:
    """Yes or no as the release reads it: no, if the text before the first full stop has the word No, no or not.

    Everything else is a yes, "NO", "cannot", "isn't" and an empty answer too; commas do not count.
    """
    first = answer.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(first.split(" "))


def parse_strict(answer: str) -> bool | None:
    """Yes, no, or None where the first sentence says neither.

    A yes or no at its beginning decides ("Yes, there is no doubt"); else a negation anywhere is a no ("I cannot see
    one", "there isn't"), and a yes anywhere or "there is" a yes.
    """
    sentence = next((part for part in _SENTENCE_END.split(answer.lower().replace("\u2019", "'")) if part.strip()), "")
    words: list[str] = re.findall(r"[a-z']+", sentence)
    if not words:
        return None
    if words[0] in ("yes", "no"):
        return words[0] == "yes"
    if any(word in _NO or word.endswith("n't") for word in words):
        return False
    return True if "yes" in words or _AFFIRMS.match(" ".join(words)) else None


def score(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[str]],
    parse: Parse = parse_published,
) -> Metrics:
    """Accuracy, precision, recall, F1 and yes rate of every split, and the means over the splits.

    Args:
        questions: from the name of a split to its questions.
        answers: from the same names to the answers, in the order of the questions.
        parse: `parse_published`, with which published numbers are made, or `parse_strict`, with which an unclear answer
            is neither yes nor no, and wrong.

    Raises:
        ValueError: there is no question, the splits or the numbers differ, or a split asks a question twice.
    """
    if list(questions) != list(answers):
        raise ValueError(
            f"pope: questions of {', '.join(questions) or 'no split'}, answers to {', '.join(answers) or 'none'}; "
            "expected answers to every split, in the same order"
        )
    for split, asked in questions.items():
        if len(asked) != len(answers[split]):
            raise ValueError(
                f"pope: {split} has {len(asked)} questions and {len(answers[split])} answers; expected one for each"
            )
    rows = [
        (split, question, answer)
        for split, asked in questions.items()
        for question, answer in zip(asked, answers[split], strict=True)
    ]
    counted = np.array([_count(question, answer, parse) for _, question, answer in rows], dtype=np.float64)
    columns: dict[str, Values] = {}
    ratios: dict[str, Ratio] = {}
    for split in questions:
        of_split = np.array([name == split for name, _, _ in rows], dtype=np.float64)
        columns.update({f"{split}: {what}": of_split * counted[:, at] for at, what in enumerate(_COUNTED)})
        ratios.update({f"{split}: {name}": _of_split(share, split) for name, share in _MEASURES.items()})
    if len(questions) > 1:
        for name in _MEANS:
            ratios[f"mean: {name}"] = _mean([ratios[f"{split}: {name}"] for split in questions])
    keys = tuple((split, question.id) for split, question, _ in rows)
    groups = tuple(question.image for _, question, _ in rows)
    which = "mean" if len(questions) > 1 else next(iter(questions), "")
    headline = tuple(f"{which}: {name}" for name in _MEANS)
    return Metrics("POPE", keys, groups, columns, ratios, headline=headline)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a split as POPE publishes them: `question_id`, `image`, `text`, and `label` yes or no.

    Raises:
        ValueError: the file is bad or empty, or an id stands there twice.
    """
    questions: dict[int, Question] = {}
    for where, record in records(path):
        number, label = take(where, record, "question_id"), take(where, record, "label")
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{where}: question_id is {shown(number)}; expected a whole number")
        if label not in ("yes", "no"):
            raise ValueError(f'{where}: label is {shown(label)}; expected "yes" or "no"')
        if number in questions:
            raise ValueError(f"{where}: question_id {number} stands there twice; expected another for each question")
        image, text = take_text(where, record, "image"), take_text(where, record, "text", "question")
        questions[number] = Question(number, image, text, label == "yes")
    if not questions:
        raise ValueError(f"{path} is empty; expected POPE's questions, one record a line")
    return list(questions.values())


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """The answers to a split's questions, in their order.

    Two layouts: with `question_id`, in any order, and the answer under `text` or `answer`, as LLaVA writes them; or
    without, in the order of the questions, with `question` (checked) and `answer`, as POPE does.

    Raises:
        ValueError: the file is bad, an id is unknown or stands there twice, a question has no answer, or, where there
            are no ids, a question is another than the one asked in its place.
    """
    rows = list(records(path))
    by_id = [row for row in rows if "question_id" in row[1]]
    if by_id and len(by_id) < len(rows):
        raise ValueError(f"{path}: {len(by_id)} of {len(rows)} records have a question_id; expected all, or none")
    if not by_id:
        return _answers_in_order(path, rows, questions)
    known = {question.id for question in questions}
    answers: dict[int, str] = {}
    for where, record in rows:
        number = record["question_id"]
        if number not in known:
            raise ValueError(
                f"{where}: question_id {shown(number)} is none of the {len(known)} questions ({min(known)} to "
                f"{max(known)}); expected the answers to this very file of questions"
            )
        if number in answers:
            raise ValueError(f"{where}: question {number} is answered twice; expected one answer to each")
        answers[number] = take_text(where, record, "text", "answer", "response")
    missing = sorted(known - set(answers))
    if missing:
        raise ValueError(
            f"{path} has no answer to {len(missing)} of {len(known)} questions ({', '.join(map(str, missing[:3]))}); "
            "expected one to each, an empty one where the model said nothing"
        )
    return [answers[question.id] for question in questions]


def _answers_in_order(
    path: str | Path, rows: Sequence[tuple[str, dict[str, object]]], questions: Sequence[Question]
) -> list[str]:
    if len(rows) != len(questions):
        raise ValueError(
            f"{path} has {len(rows)} answers to {len(questions)} questions; expected one to each, in order"
        )
    answers = []
    for (where, record), question in zip(rows, questions, strict=True):
        asked = take_text(where, record, "question", "prompt")
        if question.text.casefold() not in asked.casefold():  # a prompt may go on: "Answer with yes or no."
            raise ValueError(
                f"{where} answers {shown(asked)}, but question {question.id} is {shown(question.text)}; expected the "
                "answers in the order of the questions, or their question_id"
            )
        answers.append(take_text(where, record, "answer", "text", "response"))
    return answers


_COUNTED = ("questions", "true yes", "said yes", "right yes", "right", "unclear")
_MEASURES: dict[str, Ratio] = {
    "accuracy": ratio("right", "questions"),
    "precision": ratio("right yes", "said yes"),
    "recall": ratio("right yes", "true yes"),
    "F1": lambda sums: f1(sums["right yes"], sums["said yes"], sums["true yes"]),
    "yes rate": ratio("said yes", "questions"),
    "unclear": ratio("unclear", "questions"),
}


_MEANS = ("accuracy", "F1", "yes rate")


def _count(question: Question, answer: str, parse: Parse) -> tuple[bool, ...]:
    said = parse(answer)
    unclear = parse_strict(answer) is None
    return (True, question.answer, said is True, said is True and question.answer, said is question.answer, unclear)


def _of_split(share: Ratio, split: str) -> Ratio:
    return lambda sums: share({what: sums[f"{split}: {what}"] for what in _COUNTED})


def _mean(ratios: Sequence[Ratio]) -> Ratio:
    def mean(sums: Sums) -> Values:
        values: Values = np.mean([share(sums) for share in ratios], axis=0)
        return values

    return mean


def _choose(
    images: Mapping[str, Sequence[str]], num_images: int | None, objects_per_image: int, seed: int
) -> dict[str, tuple[str, ...]]:
    """The images that are asked about, in their order, with their different objects."""
    different = {image: tuple(dict.fromkeys(objects)) for image, objects in images.items()}
    enough = {image: objects for image, objects in different.items() if len(objects) >= objects_per_image}
    wanted = len(enough) if num_images is None else num_images
    if not 0 < wanted <= len(enough):
        raise ValueError(
            f"pope: {len(enough)} of {len(images)} images have {objects_per_image} objects or more, {wanted} are asked "
            "for; expected at least one, and as many as are asked for"
        )
    draws = Draws(seed)
    keys = {image: float(draws.uniform([_row(image)], (1,), "pope: image")[0, 0]) for image in enough}
    drawn = set(sorted(enough, key=lambda image: (keys[image], image))[:wanted])
    return {image: objects for image, objects in enough.items() if image in drawn}


def _company(images: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """For each object, the others that stand in an image with it, the most frequent first."""
    together: dict[str, Counter[str]] = {}
    for objects in images.values():
        for name in objects:
            together.setdefault(name, Counter()).update(other for other in objects if other != name)
    return {name: [other for other, _ in others.most_common()] for name, others in together.items()}


def _row(image: str) -> int:
    """A number for an image's name, to key draws by."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest(), "big") >> 1


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
