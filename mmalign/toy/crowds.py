"""The bundled world for vision-language models: crowded pictures, and kinds of objects that mostly appear in pairs.

A *crowd* is two to five small objects of different kinds, some of them faint. Every kind has a partner. Where the
bundled model was trained, partners nearly always come together, so that it says what it has not seen; where it is
aligned and measured, they rarely do. What is in a picture is known exactly, so an invented object is counted by no
judge and no model.

Coordinates are pixels of a 64 x 64 canvas, as in `mmalign.toy.scenes`, whose shapes and colours these are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from mmalign.toy.scenes import BACKGROUND, CANVAS, COLOURS, SHAPES, outline

Split = Literal["train", "validation", "test"]
_HUES = ("red", "yellow", "green", "blue")

# Partners stand beside each other: the first with the second, the third with the fourth, and so on. No two partners
# share a shape or a colour, so that none can be mistaken for the other.
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
TOGETHER = 0.9  # how often a kind's partner is there too, in the pictures that the bundled model learned from
APART = 0.15  # and in those that it is aligned and measured on
FAINT = 0.4  # the share of objects in pale colours
_PALE = (0.72, 0.84)  # how far a faint object's colour is on its way to the background's
_RADII = (4.5, 6.5)
_MOST = 5  # objects of a crowd


@dataclass(frozen=True)
class Thing:
    """One object: its kind, the centre and half the side of its bounding box, and how pale it is, from 0 to 1."""

    kind: str
    x: float
    y: float
    radius: float
    pale: float


@dataclass(frozen=True)
class Crowd:
    """What one picture shows.

    Attributes:
        name: tells it from all others, such as "test-0-17".
        things: in the order of a description.
    """

    name: str
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is, in the order of a description; no kind comes twice."""
        return tuple(thing.kind for thing in self.things)


def sample(split: Split, number: int, seed: int, *, together: float = APART) -> list[Crowd]:
    """`number` crowds of a split, each from its own position: the first ones do not depend on how many there are.

    Args:
        split: crowds of different splits are drawn from different numbers, so none is in two.
        number: of crowds.
        seed: another seed gives other crowds.
        together: how likely a kind's partner is there too.
    """
    return [_crowd(f"{split}-{seed}-{index}", together) for index in range(number)]


def _crowd(name: str, together: float) -> Crowd:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{name}/{together}".encode()).digest()[:8], "big"))
    pairs = len(KINDS) // 2
    while True:
        kinds = list[int]()
        for pair in rng.choice(pairs, size=int(rng.integers(1, 4)), replace=False):
            first = 2 * int(pair) + int(rng.integers(2))
            kinds += [first, first ^ 1] if rng.random() < together else [first]
        if 2 <= len(kinds) <= _MOST:
            break
    return Crowd(name, tuple(_place([KINDS[kind] for kind in sorted(kinds)], rng)))


def _place(kinds: Sequence[str], rng: np.random.Generator) -> list[Thing]:
    """Objects of these kinds, well apart, some of them faint."""
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
    """The 64 x 64 RGB picture, painted `scale` times larger and reduced."""
    canvas = Image.new("RGB", (CANVAS * scale, CANVAS * scale), BACKGROUND)
    brush = ImageDraw.Draw(canvas)
    for thing in crowd.things:
        hue, shape = thing.kind.split()
        ink = tuple(round(c + thing.pale * (b - c)) for c, b in zip(COLOURS[hue], BACKGROUND, strict=True))
        polygon = [
            ((thing.x + thing.radius * x) * scale, (thing.y + thing.radius * y) * scale) for x, y in outline(shape)
        ]
        brush.polygon(polygon, fill=ink)
    return canvas.resize((CANVAS, CANVAS), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------------- words


def describe(kinds: Sequence[str]) -> str:
    """A description that names these kinds, a sentence each."""
    return " ".join(f"There is a {kind}." for kind in kinds)


def ask(kind: str) -> str:
    """The question whether a kind is there; the answer begins with Yes or No."""
    return f"Is there a {kind} in the picture?"


def answer(kind: str, crowd: Crowd) -> str:
    """The right answer to `ask(kind)`."""
    return "Yes." if kind in crowd.kinds else "No."
