"""POPE: yes/no questions on whether an object is in the image (arXiv:2305.10355).

Half of the questions ask for objects of the image, the other half for absent ones. The splits differ in the absent
objects: random; popular, the most frequent objects first; and adversarial, the most frequent companions of the previous
question's object. "Yes" is the positive class:

    accuracy = right answers / questions          precision = right yes / all yes
    recall   = right yes / true yes               F1 = 2 right yes / (all yes + true yes)

Papers report the mean of F1 or of accuracy over the splits, so both are here. The yes rate exposes a model that says
yes to everything. An answer that `yes_no.parse_strict` cannot read is unclear, whatever the parser in use.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mmalign.data.formats.files import records, shorten
from mmalign.evaluation.annotations import (
    Question,
    Record,
    image_id,
    index,
    take,
    take_question,
    take_question_id,
    take_text,
)
from mmalign.evaluation.metrics import Metrics, Ratio, Sums, as_columns_by_kind, f1, ratio
from mmalign.evaluation.question_files import read_rows
from mmalign.evaluation.statistics import Values
from mmalign.language.objects import article
from mmalign.language.yes_no import final_answer, parse_strict
from mmalign.rng import KeyedRNG

Split = Literal["random", "popular", "adversarial"]
Parse = Callable[[str], bool | None]

SPLITS: tuple[Split, ...] = get_args(Split)
TEMPLATE = "Is there {} in the image?"

_COUNTS = ("questions", "true yes", "said yes", "right yes", "right", "unclear")
_RATIOS: dict[str, Ratio] = {
    "accuracy": ratio("right", "questions"),
    "precision": ratio("right yes", "said yes"),
    "recall": ratio("right yes", "true yes"),
    "F1": lambda sums: f1(sums["right yes"], sums["said yes"], sums["true yes"]),
    "yes rate": ratio("said yes", "questions"),
    "unclear": ratio("unclear", "questions"),
}
_MEANS = ("accuracy", "F1", "yes rate", "unclear")


def build(
    images: Mapping[str, Sequence[str]],
    split: Split,
    *,
    num_images: int | None = None,
    objects_per_image: int = 3,
    names: Sequence[str] | None = None,
    companions: Mapping[str, Sequence[str]] | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[Question]:
    """Build the questions of a split: for each image, a present and an absent object in turn.

    The present objects are an image's first ones. Questions on an image ask for different objects. Popularity and
    co-occurrence are counted over the chosen images, as in the release; ties have the order of appearance. If no
    companion of the present object is left, the absent one is random. Random choices are keyed by the image's name, so
    other images do not change them.

    Args:
        images: the objects of each image (`annotations.read_objects`); images with fewer than `objects_per_image` are
            left out. The paper uses the objects of MSCOCO's masks and captions.
        split: the choice of absent objects.
        num_images: the number of random images (500 in the paper), all by default.
        objects_per_image: the number of present objects asked for per image, and of absent ones (3 in the paper).
        names: candidates for absent objects; the objects of the chosen images by default.
        companions: the companions of each object, the most frequent first; counted over the chosen images by default.
        template: the question, with {} for "a dog" or "an apple".
        seed: the seed of the random choices.

    Raises:
        ValueError: the split is unknown, the template has no {}, there are too few images, or too few absent objects
            to ask for.
    """
    if split not in SPLITS:
        raise ValueError(f"pope: {split!r} is not a split; expected one of {', '.join(SPLITS)}")
    if "{}" not in template:
        raise ValueError(f"pope: the template {template!r} has no {{}}; expected one for 'a dog'")
    # Images, and candidates for absent objects by popularity
    chosen = _choose(images, num_images, objects_per_image, seed)
    popularity = Counter(name for objects in chosen.values() for name in objects)
    if companions is None:
        companions = _companions(chosen)
    candidates = list(dict.fromkeys(names)) if names is not None else list(popularity)
    by_popularity = sorted(candidates, key=lambda name: -popularity[name])
    # Questions: each present object, then an absent one
    questions: list[Question] = []
    for image, objects in chosen.items():
        if len(set(candidates) - set(objects)) < objects_per_image:
            raise ValueError(
                f"pope: image {image} has {len(objects)} of {len(candidates)} objects, fewer than {objects_per_image} "
                "are absent; give more objects under `names`, or fewer `objects_per_image`"
            )
        orders = {"random": _shuffled(candidates, image, seed), "popular": by_popularity}
        asked = objects[:objects_per_image]
        for present, absent in zip(asked, _absent(asked, objects, orders, companions, split), strict=True):
            for name, answer in ((present, True), (absent, False)):
                text = template.format(f"{article(name)} {name}")
                questions.append(Question(len(questions) + 1, image, text, answer))
    return questions


def parse_published(answer: str) -> bool:
    """Parse yes or no as the release does: "no" if the text before the first full stop has the word No, no or not.

    Everything else is a yes, including "NO", "cannot", "isn't" and an empty answer. Commas are removed.
    """
    first = answer.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(first.split(" "))


def score(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Sequence[str]], parse: Parse = parse_published
) -> Metrics:
    """Return accuracy, precision, recall, F1, yes rate and unclear rate of every split.

    With several splits, the means of accuracy, F1, yes rate and unclear rate over the splits follow.

    Args:
        questions: the questions of each split.
        answers: the answers of each split, in the order of its questions.
        parse: `parse_published`, for comparison with published numbers, or `yes_no.parse_strict`, with which an unclear
            answer is neither yes nor no, and wrong.

    Raises:
        ValueError: there is no question, the splits or the numbers differ, or a split repeats a question.
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
    # Counts of every answer, by split
    rows = [
        (split, question, _count(question, answer, parse))
        for split, asked in questions.items()
        for question, answer in zip(asked, answers[split], strict=True)
    ]
    columns = as_columns_by_kind(list(questions), [(split, counts) for split, _, counts in rows])
    # Metrics of every split, and their means
    ratios: dict[str, Ratio] = {
        f"{split}: {name}": partial(_mean_over_splits, [split], measure)
        for split in questions
        for name, measure in _RATIOS.items()
    }
    if len(questions) > 1:
        ratios |= {f"mean: {name}": partial(_mean_over_splits, list(questions), _RATIOS[name]) for name in _MEANS}
    scope = "mean" if len(questions) > 1 else next(iter(questions), "")
    return Metrics(
        "POPE",
        tuple((split, question.id) for split, question, _ in rows),
        tuple(question.image for _, question, _ in rows),
        columns,
        ratios,
        headline=tuple(f"{scope}: {name}" for name in _MEANS),
    )


def _count(question: Question, answer: str, parse: Parse) -> dict[str, bool]:
    parsed, is_true = parse(answer), question.answer is True
    unclear = parse_strict(answer) is None
    values = (True, is_true, parsed is True, parsed is True and is_true, parsed is is_true, unclear)
    return dict(zip(_COUNTS, values, strict=True))


def _mean_over_splits(splits: Sequence[str], measure: Ratio, sums: Sums) -> Values:
    by_split = [measure({count: sums[f"{split}: {count}"] for count in _COUNTS}) for split in splits]
    means: Values = np.mean(by_split, axis=0)
    return means


# ----------------------------------------------------------------------------------------------------------- the files


Labels = Mapping[tuple[str, str], bool]  # the answers to questions, by image and `_key`


def read_splits(paths: Mapping[str, str | Path], labels: Labels | None = None) -> dict[str, list[Question]]:
    """Read POPE's questions: `question_id`, `image`, `text` or `question`, and `label` or `answer` yes or no.

    The release has a file for each split. A file under the name "" may have all splits, named in `category`, as those
    of LLaVA and lmms-lab.

    Args:
        paths: the files by split.
        labels: the labels of questions without one, from `read_labels`.

    Raises:
        ValueError: a file is invalid, repeats a question of a split, or has questions without a label.
    """
    splits: dict[str, list[tuple[str, int | str, Question]]] = {}
    for split, path in paths.items():
        rows, _ = read_rows(path)
        for number, (location, record) in enumerate(rows, start=1):
            question = _read_question(location, record, number, labels)
            category = record.get("category")
            # In a file of all splits each record may name its own
            name = split or (str(category) if category in SPLITS else Path(path).stem)
            splits.setdefault(name, []).append((location, question.id, question))
        if not rows:
            raise ValueError(f"{path} is empty; expected POPE's questions, one record a line")
    return {split: list(index(split, "question_id", entries, "").values()) for split, entries in splits.items()}


def _read_question(location: str, record: Record, number: int, labels: Labels | None) -> Question:
    is_labelled = labels is None or {"label", "answer"} & record.keys()
    answer = _take_label(location, record) if is_labelled else None
    image, text = take_text(location, record, "image"), take_question(location, record, "text", "question")
    if labels is not None and answer is None:
        answer = labels.get((image_id(image), _key(text)))
        if answer is None:
            raise ValueError(f"{location}: no label for {shorten(text)} about {image}; use labels of the same release")
    return Question(take_question_id(location, record, number), image, text, answer)


def _take_label(location: str, record: Record) -> bool:
    if not {"label", "answer"} & record.keys():
        raise ValueError(
            f"{location} has {shorten(list(record))}; expected 'label' yes or no; or name POPE's files, which have "
            "labels, under `labels`"
        )
    label = take(location, record, "label", "answer")
    word = str(label).strip(" .").lower()
    if word not in ("yes", "no"):
        raise ValueError(f'{location}: label is {shorten(label)}; expected "yes" or "no"')
    return word == "yes"


def read_labels(paths: Sequence[str | Path]) -> Labels:
    """Read the labels of POPE's files, for questions in other files, such as LLaVA's llava_pope_test.jsonl.

    Raises:
        ValueError: a file is invalid, or two records contradict each other.
    """
    labels: dict[tuple[str, str], bool] = {}
    for location, record in (located for path in paths for located in records(path)):
        image = image_id(take_text(location, record, "image"))
        key, label = (image, _key(take_question(location, record, "text", "question"))), _take_label(location, record)
        if labels.setdefault(key, label) != label:
            raise ValueError(f"{location}: label contradicts an earlier one of the same question; use one release")
    return labels


def _key(text: str) -> str:
    """Return the words of a question up to its question mark: a prompt may continue, and old files say "imange"."""
    return text.partition("?")[0].strip().casefold().replace("imange", "image")


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """Read the answers to questions, and return them in the questions' order.

    There are two layouts. LLaVA writes `question_id`, in any order, and the answer under `text` or `answer`. POPE
    writes `question` (checked) and `answer`, in the order of the questions.

    Raises:
        ValueError: an id is unknown or not unique, a question has no answer, or, without ids, the questions differ.
    """
    rows = list(records(path))
    # By id, or in the order of the questions
    num_with_id = sum("question_id" in record for _, record in rows)
    if 0 < num_with_id < len(rows):
        raise ValueError(f"{path}: {num_with_id} of {len(rows)} records have a question_id; expected all, or none")
    if not num_with_id:
        return _answers_in_order(path, rows, questions)
    known = dict.fromkeys(question.id for question in questions)
    if len(known) < len(questions):
        raise ValueError(f"{path}: splits use the same question_id; expected a file of answers for each split")
    ids = list(known)
    for location, record in rows:
        if (question_id := take_question_id(location, record)) not in known:
            raise ValueError(
                f"{location}: question_id {shorten(question_id)} is none of the {len(known)} questions ({ids[0]} to "
                f"{ids[-1]}); expected the answers to this file of questions"
            )
    entries = (
        (at, take_question_id(at, record), take_text(at, record, "text", "answer", "response")) for at, record in rows
    )
    answers = index(path, "question_id", entries, "one answer to each question")
    missing = [question_id for question_id in ids if question_id not in answers]
    if missing:
        raise ValueError(
            f"{path} has no answer to {len(missing)} of {len(known)} questions ({', '.join(map(str, missing[:3]))}); "
            "expected one to each, an empty one for an empty answer"
        )
    return [final_answer(answers[question_id]) for question_id in ids]


def _answers_in_order(path: str | Path, rows: Sequence[tuple[str, Record]], questions: Sequence[Question]) -> list[str]:
    if len(rows) != len(questions):
        raise ValueError(
            f"{path} has {len(rows)} answers to {len(questions)} questions; expected one to each, in order"
        )
    answers = []
    for (location, record), question in zip(rows, questions, strict=True):
        text = take_question(location, record, "question", "prompt")
        # A record may have more words than the question, such as those of a prompt
        if _key(question.text) not in _key(text):
            raise ValueError(
                f"{location} answers {shorten(text)}, but question {question.id} is {shorten(question.text)}; expected "
                "the answers in the order of the questions, or their question_id"
            )
        answers.append(final_answer(take_text(location, record, "answer", "text", "response")))
    return answers


# --------------------------------------------------------------------------------------------------------- the choices


def _choose(
    images: Mapping[str, Sequence[str]], num_images: int | None, objects_per_image: int, seed: int
) -> dict[str, tuple[str, ...]]:
    """Choose random images, and return them in their order with their distinct objects."""
    distinct = {image: tuple(dict.fromkeys(objects)) for image, objects in images.items()}
    enough = {image: objects for image, objects in distinct.items() if len(objects) >= objects_per_image}
    number = len(enough) if num_images is None else num_images
    if not 0 < number <= len(enough):
        raise ValueError(
            f"pope: {len(enough)} of {len(images)} images have {objects_per_image} objects or more, {number} are asked "
            "for; expected at least one, and as many as are asked for"
        )
    rng = KeyedRNG(seed)
    # A key for each image, whatever the others are; the smallest ones are chosen
    keys = {image: float(rng.uniform([_row(image)], (1,), "pope: image")[0, 0]) for image in enough}
    chosen = set(sorted(enough, key=lambda image: (keys[image], image))[:number])
    return {image: objects for image, objects in enough.items() if image in chosen}


def _companions(images: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the companions of each object, the other objects of its images, the most frequent first."""
    companions: dict[str, Counter[str]] = {}
    for objects in images.values():
        for name in objects:
            companions.setdefault(name, Counter()).update(other for other in objects if other != name)
    return {name: [other for other, _ in others.most_common()] for name, others in companions.items()}


def _absent(
    asked: Sequence[str],
    objects: Sequence[str],
    orders: Mapping[str, Sequence[str]],
    companions: Mapping[str, Sequence[str]],
    split: Split,
) -> list[str]:
    """Return an absent object for each present one that is asked for, all different, in the order of the split."""
    excluded, absent, candidates = set(objects), list[str](), set(orders["random"])
    for present in asked:
        # Companions that may be asked for; once they run out, random objects
        close = [name for name in companions.get(present, ()) if name in candidates]
        ranked = [*close, *orders["random"]] if split == "adversarial" else orders[split]
        absent.append(next(name for name in ranked if name not in excluded))
        excluded.add(absent[-1])
    return absent


def _shuffled(names: Sequence[str], image: str, seed: int) -> list[str]:
    """Return names in a random order that depends on the seed and the image alone."""
    keys = KeyedRNG(seed).uniform([_row(image)], (len(names),), "pope: absent object")[0].tolist()
    return [name for _, name in sorted(zip(keys, names, strict=True))]


def _row(image: str) -> int:
    """Return a hash of an image's name, as a key of random numbers."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest(), "big") >> 1
