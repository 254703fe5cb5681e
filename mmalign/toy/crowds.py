"""Bundled world for vision-language models: images of several objects, with kinds that often co-occur.

A *crowd* is two to five small objects of different kinds, some of them faint. Every kind has a partner. In the bundled
model's training data partners nearly always occur together, so the model hallucinates them. In the data for alignment
and evaluation they rarely do. The content of an image is known exactly, so hallucinations are counted without a judge
model.

Coordinates are pixels of a 64 x 64 canvas, as in `mmalign.toy.scenes`, whose shapes and colours these are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mmalign.toy.scenes import BACKGROUND, CANVAS, COLOURS, SHAPES, paint

Split = Literal["train", "validation", "test"]
_HUES = ("red", "yellow", "green", "blue")

# Partners are neighbours in the list: first and second, third and fourth, and so on. Partners differ in both shape and
# colour, so that they cannot be confused.
KINDS: tuple[str, ...] = tuple(
    f"{hue} {shape}"
    for near, far in itertools.product(range(len(SHAPES) // 2), range(len(_HUES)))
    for hue, shape in (
        (_HUES[far], SHAPES[near]),
        (_HUES[(far + 1 + near) % len(_HUES)], SHAPES[near + len(SHAPES) // 2]),
    )
)
PARTNERS: dict[str, str] = {kind: KINDS[at ^ 1] for at, kind in enumerate(KINDS)}

QUESTION = "What is in the picture?"
TOGETHER = 0.9  # probability of a kind's partner in the bundled model's training images
APART = 0.15  # the same in the images for alignment and evaluation
FAINT = 0.4  # share of objects in pale colours
_PALE = (0.72, 0.84)  # mix of a faint object's colour with the background: 0 colour, 1 background
_RADII = (4.5, 6.5)
_MOST = 5  # most objects in a crowd


@dataclass(frozen=True)
class Thing:
    """One object: its kind, the centre and half side of its bounding box, and its paleness from 0 to 1."""

    kind: str
    x: float
    y: float
    radius: float
    pale: float


@dataclass(frozen=True)
class Crowd:
    """Content of one image.

    Attributes:
        name: unique name, such as "test-0-17".
        things: the objects, in the order of a description.
    """

    name: str
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the objects, in the order of a description, each once."""
        return tuple(thing.kind for thing in self.things)


def sample(split: Split, number: int, seed: int, *, together: float = APART) -> list[Crowd]:
    """Return `number` random crowds of a split; each depends on its index, not on `number`.

    Args:
        split: the split; different splits use different random numbers.
        number: number of crowds.
        seed: the seed of the crowds.
        together: probability that a kind's partner is present.
    """
    return [_crowd(f"{split}-{seed}-{index}", together) for index in range(number)]


def _crowd(name: str, together: float) -> Crowd:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{name}/{together}".encode()).digest()[:8], "big"))
    pairs = len(KINDS) // 2
    while True:
        # Some pairs of partners: of each both, or a random one of them
        kinds = list[int]()
        for pair in rng.choice(pairs, size=int(rng.integers(1, 4)), replace=False):
            first = 2 * int(pair) + int(rng.integers(2))
            kinds += [first, first ^ 1] if rng.random() < together else [first]
        if 2 <= len(kinds) <= _MOST:
            break
    return Crowd(name, tuple(_place([KINDS[kind] for kind in sorted(kinds)], rng)))


def _place(kinds: Sequence[str], rng: np.random.Generator) -> list[Thing]:
    """Return objects of these kinds at random separate positions, some of them faint."""
    while True:
        radii = rng.uniform(*_RADII, size=len(kinds))
        centres = [rng.uniform(r + 1.5, CANVAS - r - 1.5, size=2) for r in radii]
        if all(
            max(abs(centres[a] - centres[b])) > radii[a] + radii[b] + 2.0
            for a, b in itertools.combinations(range(len(kinds)), 2)
        ):
            break
    pale = np.where(rng.random(len(kinds)) < FAINT, rng.uniform(*_PALE, size=len(kinds)), 0.0)
    return [
        Thing(kind, float(centre[0]), float(centre[1]), float(radius), float(p))
        for kind, centre, radius, p in zip(kinds, centres, radii, pale, strict=True)
    ]


def render(crowd: Crowd, scale: int = 4) -> Image.Image:
    """Return the 64 x 64 RGB image, painted `scale` times larger and reduced."""
    shapes = []
    for thing in crowd.things:
        hue, shape = thing.kind.split()
        ink = tuple(round(c + thing.pale * (b - c)) for c, b in zip(COLOURS[hue], BACKGROUND, strict=True))
        shapes.append((shape, thing.x, thing.y, thing.radius, ink))
    return paint(shapes, scale)


# ---------------------------------------------------------------------------------------------------- words


def describe(kinds: Sequence[str]) -> str:
    """Return a description with one sentence for each kind."""
    return " ".join(f"There is a {kind}." for kind in kinds)


def ask(kind: str) -> str:
    """Return the question about a kind's presence; its answer begins with Yes or No."""
    return f"Is there a {kind} in the picture?"


def answer(kind: str, crowd: Crowd) -> str:
    """Return the correct answer to `ask(kind)`."""
    return "Yes." if kind in crowd.kinds else "No."
