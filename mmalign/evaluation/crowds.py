"""How much a model invents in the bundled world, whose pictures are known exactly, so that no judge can be flattered.

Every held-out picture is to be described (CHAIR_i, CHAIR_s, recall, length), and of two of its objects and of two that
are not there it is asked whether they are (POPE). In the adversarial split an absent object is the partner of a present
one: what the model has most often seen beside it.
"""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Literal

from PIL import Image

from mmalign.data import crowds
from mmalign.data.scenes import COLOURS, SHAPES
from mmalign.evaluation import pope
from mmalign.evaluation.benchmarks import Descriptions, Question, Together, YesNo
from mmalign.language.objects import Vocabulary, vocabulary

TEMPLATE = "Is there {} in the picture?"  # with its article, what `crowds.ask` says
ASKED = 2  # present and absent objects of a picture that are asked for: no picture has fewer objects


def benchmark(pictures: int, split: Literal["validation", "test"], seed: int) -> Together:
    """Descriptions and yes/no questions on this many pictures of a split, in which partners are rarely together."""
    found = {crowd.name: crowd for crowd in crowds.sample(split, pictures, seed)}
    images = partial(_draw, found)
    questions = [Question(number, name, crowds.QUESTION) for number, name in enumerate(found, start=1)]
    kinds = {name: crowd.kinds for name, crowd in found.items()}
    partners = {kind: (partner,) for kind, partner in crowds.PARTNERS.items()}
    asked: dict[str, list[pope.Question]] = {
        which: pope.build(
            kinds,
            which,
            objects_per_image=ASKED,
            names=crowds.KINDS,
            company=partners,
            template=TEMPLATE,
            seed=seed,
        )
        for which in pope.SPLITS
    }
    described = Descriptions(questions, {name: frozenset(there) for name, there in kinds.items()}, words(), images)
    return Together(described, YesNo(asked, images, pope.parse_strict))


@cache
def words() -> Vocabulary:
    """Every colour with every shape: also kinds that the world does not have are named, and are then invented."""
    return vocabulary({f"{colour} {shape}": [] for colour, shape in itertools.product(COLOURS, SHAPES)})


def _draw(found: dict[str, crowds.Crowd], name: str) -> Image.Image:
    return crowds.draw(found[name])
