"""Hallucination benchmark on the bundled world of crowds, with exact ground truth and no reward model.

The model describes every held-out image (CHAIR_i, CHAIR_s, recall, length). It also answers whether two present and two
absent objects are in the image (POPE). In the adversarial split an absent object is the partner of a present one, its
most frequent companion in training.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Literal

from PIL.Image import Image

from mmalign.evaluation.annotations import Question
from mmalign.evaluation.benchmarks import pope
from mmalign.evaluation.benchmarks.base import Benchmark, caption_benchmark, combine, yes_no_benchmark
from mmalign.language.objects import Vocabulary, vocabulary
from mmalign.language.yes_no import parse_strict
from mmalign.toy import crowds
from mmalign.toy.scenes import COLOURS, SHAPES

TEMPLATE = "Is there {} in the picture?"  # with an article it is the question of `crowds.ask`
OBJECTS_PER_PICTURE = 2  # present objects, and as many absent ones, in the questions; no image has fewer objects


def benchmark(pictures: int, split: Literal["validation", "test"], seed: int) -> Benchmark:
    """Return the benchmark on held-out images, in which partners are rarely together."""
    by_name = {crowd.name: crowd for crowd in crowds.sample(split, pictures, seed)}
    kinds = {name: crowd.kinds for name, crowd in by_name.items()}
    # Partners are those of the training images, where they are together
    partners = {kind: (partner,) for kind, partner in crowds.PARTNERS.items()}
    yes_no_questions: dict[str, list[Question]] = {
        name: pope.build(
            kinds,
            name,
            objects_per_image=OBJECTS_PER_PICTURE,
            names=crowds.KINDS,
            companions=partners,
            template=TEMPLATE,
            seed=seed,
        )
        for name in pope.SPLITS
    }
    questions = [Question(number, name, crowds.QUESTION) for number, name in enumerate(by_name, start=1)]
    objects = {name: frozenset(present) for name, present in kinds.items()}

    def draw(name: str) -> Image:
        return crowds.render(by_name[name])

    return combine(
        caption_benchmark(questions, objects, words(), draw), yes_no_benchmark(yes_no_questions, draw, parse_strict)
    )


@cache
def words() -> Vocabulary:
    """Return the vocabulary of every colour with every shape; a kind that the world lacks is always invented."""
    return vocabulary({f"{colour} {shape}": [] for colour, shape in itertools.product(COLOURS, SHAPES)})
