"""Gallery of a vision-language evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from mmalign.config import EvaluateResponses, Recipe
from mmalign.evaluation.benchmarks.base import CAPTIONS, RatedAnswer
from mmalign.modalities import Sample, SamplesFile, read_samples
from mmalign.modalities.vision_language.benchmark import read_benchmark
from mmalign.pages.answers import answer_entry
from mmalign.pages.page import GalleryEntry


class Answer(TypedDict):
    """Fields of a `RatedAnswer`."""

    text: str
    score: float
    note: str
    invented: tuple[tuple[int, int], ...]


class AnswerSample(TypedDict):
    """Question with its truth in words, and its answers before and after alignment."""

    part: str
    image: str
    question: str
    truth: str
    before: Answer
    after: Answer


def read(folder: Path) -> SamplesFile[AnswerSample]:
    """Read the samples of an evaluation's folder.

    Raises:
        ValueError: the file cannot be read, or is damaged.
    """
    return read_samples(SamplesFile[AnswerSample], folder)


def unavailable_reason(recipe: Recipe) -> str | None:
    """Return the reason why an evaluation has no samples to show, or None."""
    section = recipe.evaluate
    assert isinstance(section, EvaluateResponses)
    if section.benchmark == "implicit":
        return "benchmark implicit asks no question"
    return "existing answers are scored and not shown" if section.answers is not None else None


def gallery_entries(recipe: Recipe, _: Path, samples: Sequence[tuple[int, Sample]]) -> list[GalleryEntry]:
    """Return the gallery's entries of an evaluation's samples, given as (index, sample).

    Raises:
        ValueError: a file of the benchmark or an image is missing.
    """
    assert isinstance(recipe.evaluate, EvaluateResponses)
    images = read_benchmark(recipe.evaluate).images
    return [
        answer_entry(
            images(sample["image"]),
            sample["image"],
            sample["question"],
            sample["truth"],
            RatedAnswer(**sample["before"]),
            RatedAnswer(**sample["after"]),
        )
        for _, sample in samples
    ]


def benchmark_of(sample: Sample) -> str:
    """Return the benchmark of a sample: descriptions, or yes/no questions of any split."""
    return CAPTIONS if sample["part"] == CAPTIONS else "yes/no questions"


def provenance(recipe: Recipe, num_samples: int) -> dict[str, str]:
    """Return the decoding settings behind a page's entries."""
    assert isinstance(recipe.evaluate, EvaluateResponses)
    decoding = recipe.evaluate.decoding
    how = f"sampled at temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
    return {
        "answers": f"{how}, at most {decoding.max_new_tokens} tokens",
        "questions": f"{num_samples} of {recipe.evaluate.benchmark}, the same to both models",
    }
