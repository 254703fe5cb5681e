"""Preference data as the checks see it: pairs of either modality, their images, and what a recipe adds."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from PIL import Image

from mmalign.console import tracked
from mmalign.data.formats.prompts import PromptRow
from mmalign.data.pairs import ImagePair, ImageRef, Pairs, ResponsePair, SkippedRow
from mmalign.doctor.pictures import Picture, look, same_picture
from mmalign.families.base import PromptProcessor

Kind = Literal["image pairs", "response pairs", "prompts"]
TRAINING, VALIDATION = "training", "validation split"
_CHUNK = 64  # pairs that threads read at a time


@dataclass(frozen=True)
class NotChecked:
    """Reason why a check did not run."""

    reason: str


@dataclass(frozen=True)
class EvaluationInputs:
    """Prompts and images of an evaluation besides the validation split; images by name, decoded on call."""

    prompts: Sequence[str] = ()
    images: Sequence[tuple[str, Callable[[], Image.Image]]] = ()


@dataclass(frozen=True)
class ResponseTokens:
    """Tokenizer and image preprocessor of a vision-language model, and the maximum number of a row's tokens."""

    processor: PromptProcessor
    max_length: int


@dataclass(frozen=True)
class RecipeInputs:
    """Inputs of checks that only a recipe can name.

    Attributes:
        evaluation: prompts and images of the recipe's evaluation.
        count_truncated: a function that counts prompts beyond the text encoder's limit.
        tokens: the tokenizer of a vision-language model.
    """

    evaluation: EvaluationInputs | NotChecked
    count_truncated: Callable[[Sequence[str]], int] | NotChecked
    tokens: ResponseTokens | NotChecked


@dataclass(frozen=True)
class Side:
    """Side of a pair: its images, and its response or its own prompt; empty for an image of a pair with one prompt."""

    text: str
    images: tuple[ImageRef, ...]

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """Normalized text and keys of the images."""
        return (normalize(self.text), *(image.key for image in self.images))


@dataclass(frozen=True)
class Case:
    """Pair under examination, of either modality.

    Attributes:
        pair: the pair.
        split: the name of its split.
        prompt: the prompt that both sides share; empty if each image has its own.
        chosen: the preferred side.
        rejected: the other side.
        same_pictures: whether the images of both sides are nearly the same.
    """

    pair: ImagePair | ResponsePair
    split: str
    prompt: str
    chosen: Side
    rejected: Side
    same_pictures: bool

    @property
    def location(self) -> str:
        """Location of the pair: "pairs.parquet: row 17"."""
        return self.pair.location

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images of the pair, each once."""
        pair = self.pair
        if isinstance(pair, ImagePair):
            return tuple(dict.fromkeys(pair.images))
        return tuple(dict.fromkeys((*pair.images, *pair.rejected_images, *pair.other_images)))


@dataclass(frozen=True)
class Prompt:
    """Prompt of a split, once, with the location of its first row."""

    text: str
    split: str
    location: str


@dataclass(frozen=True)
class Corpus:
    """Data to examine.

    Attributes:
        kind: the kind of its rows.
        cases: the pairs of all splits.
        prompts: the prompts of images, each once in a split; empty for response pairs.
        pictures: facts of all images, by key.
        skipped: the rows that the reader skips.
        tied: locations of the ties that the reader skips.
        inputs: inputs from the recipe.
    """

    kind: Kind
    cases: Sequence[Case]
    prompts: Sequence[Prompt]
    pictures: Mapping[str, Picture]
    skipped: Sequence[SkippedRow]
    tied: Sequence[str]
    inputs: RecipeInputs

    @property
    def compared(self) -> list[Case]:
        """The cases with two sides or more, without single outputs and prompts alone."""
        return [case for case in self.cases if len(_outputs(case.pair)) > 1]


def survey(sources: Sequence[tuple[str, Pairs[Any]]], inputs: RecipeInputs) -> Corpus:
    """Read all pairs and decode all images of some sources, given with the names of their splits.

    Raises:
        ValueError: the sources hold both pairs of images and pairs of responses, or an image's path is refused.
    """
    cases, prompts, pictures = list[Case](), dict[tuple[str, str], Prompt](), dict[str, Picture]()
    kinds = set[Kind]()
    for split, pairs in sources:
        for start in tracked(range(0, len(pairs), _CHUNK), f"read the {split} pairs"):
            rows = list(pairs[start : start + _CHUNK])
            kinds.update(map(_kind, rows))
            for row in rows:
                for text in _image_prompts(row):
                    prompts.setdefault((split, text), Prompt(text, split, row.location))
            # Threads read and decode the images of a chunk
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                chunk = list(pool.map(partial(examine, split), (row for row in rows if _kind(row) != "prompts")))
            for case, seen in chunk:
                cases.append(case)
                pictures.update(seen)
    if len(kinds) > 1:
        raise ValueError(f"doctor: the files hold {' and '.join(sorted(kinds))}; give one kind at a time")
    # All splits of a source list the rows that its reader skipped
    skipped = list(dict.fromkeys(row for _, pairs in sources for row in pairs.skipped))
    tied = {pairs.source: pairs.tied for _, pairs in sources}
    return Corpus(
        kinds.pop(),
        cases,
        list(prompts.values()),
        pictures,
        skipped,
        [location for locations in tied.values() for location in locations],
        inputs,
    )


def _kind(row: ImagePair | ResponsePair | PromptRow) -> Kind:
    if isinstance(row, PromptRow):
        return "prompts"
    return "image pairs" if isinstance(row, ImagePair) else "response pairs"


def _outputs(pair: ImagePair | ResponsePair) -> Sequence[object]:
    return pair.outputs if isinstance(pair, ImagePair) else pair.responses


def _image_prompts(row: ImagePair | ResponsePair | PromptRow) -> list[str]:
    """Return the prompts from which a row's images are generated; many response pairs share one question."""
    if isinstance(row, ResponsePair):
        return []
    second = row.rejected_prompt if isinstance(row, ImagePair) else ""
    return [row.prompt, *filter(None, [second])]


def examine(split: str, pair: ImagePair | ResponsePair) -> tuple[Case, dict[str, Picture]]:
    """Return a pair as the checks see it, and the facts of its images."""
    if isinstance(pair, ImagePair):
        # Two prompts are their sides' texts; one prompt is the pair's
        two = bool(pair.rejected_prompt)
        prompt = "" if two else pair.prompt
        chosen = Side(pair.prompt if two else "", (pair.chosen,))
        # The last one of a list; a single output has no other side
        rejected = Side(pair.rejected_prompt, pair.outputs[1:][-1:])
    else:
        prompt = "\n".join(f"{turn.role}: {turn.text}" for turn in pair.turns)
        chosen, rejected = (
            Side(pair.chosen, pair.images),
            Side(pair.responses[-1] if pair.rejected else "", pair.rejected_images),
        )
    same = len(chosen.images) == len(rejected.images) and all(map(same_picture, chosen.images, rejected.images))
    case = Case(pair, split, prompt, chosen, rejected, same)
    return case, {ref.key: look(ref)[0] for ref in case.images}


# ---------------------------------------------------------------------------------------------------------------- texts

_ARTICLES = {"a", "an", "the"}
_SHORTEST_SLIP = 5  # letters; a slip in a shorter word often makes another word


def normalize(text: str) -> str:
    """Return the words of a text in lower case, without punctuation; a text without words stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def nearly_same_text(first: str, second: str) -> bool:
    """Return whether two texts differ by case, punctuation, articles or slips of the pen alone."""
    words, other_words = (
        [word for word in normalize(text).split() if word not in _ARTICLES] for text in (first, second)
    )
    return len(words) == len(other_words) and all(
        a == b or _is_slip(a, b) for a, b in zip(words, other_words, strict=True)
    )


def _is_slip(first: str, second: str) -> bool:
    """Return whether a long word lacks a letter of the other or has two neighbours swapped.

    A letter that replaces another, or a final s, often makes another word: house and horse, light and lights.
    """
    short, long = sorted((first, second), key=len)
    if len(long) < _SHORTEST_SLIP or not (first + second).isalpha():
        return False
    # Two neighbours swapped
    if len(short) == len(long):
        differing = [index for index in range(len(long)) if short[index] != long[index]]
        start = differing[0]
        return len(differing) == 2 and short[start : start + 2] == long[start : start + 2][::-1]
    # A letter missing, but not a final s
    return any(long[:index] + long[index + 1 :] == short for index in range(len(long))) and long != f"{short}s"
