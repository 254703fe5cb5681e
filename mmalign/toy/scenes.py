"""Bundled text-to-image world: captioned scenes of coloured shapes, rendered and read back exactly.

A *prompt* asks for one object, a count, two objects, or two objects in a relation (a small GenEval). `place_objects`
places objects that satisfy it, and `render` paints them. `read` finds the objects in any image, including generated
ones. `check` returns the parts of the prompt that they fulfil. `read` is the metric of the bundled comparisons, so no
training uses it.

Coordinates are pixels of a 64 x 64 canvas, y downwards; a radius is half the larger side of the bounding box.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

CANVAS = 64
BACKGROUND = (255, 255, 255)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "orange": (245, 145, 30),
    "yellow": (250, 220, 50),
    "green": (45, 160, 75),
    "blue": (45, 95, 210),
    "purple": (135, 60, 165),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES: dict[str, tuple[float, float]] = {"small": (6.0, 7.5), "large": (12.0, 14.5)}
SIZE_BOUNDARY = 9.75  # radii below it are small
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "above")
CATEGORIES = ("single", "count", "two", "relation")
ATTRIBUTES = ("count", "colour", "shape", "size", "relation")

_MIN_AREA = 18  # pixels; smaller regions are not objects
_GAP = 3.0  # pixels between the bounding boxes of two objects

Split = Literal["train", "validation", "test"]
Truth = dict[str, bool]


@dataclass(frozen=True)
class Object:
    """One shape on the canvas; `x`, `y` is the centre of its bounding box, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Group:
    """Group of `number` objects with one colour and shape, and one size if the prompt names it."""

    number: int
    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        word = next((w for w, n in NUMBERS.items() if n == self.number), None)
        if word:
            return f"{word} {self.colour} {self.shape}{'es' if self.shape == 'cross' else 's'}"
        adjectives = " ".join(filter(None, (self.size, self.colour)))
        return f"{'an' if adjectives[0] in 'aeiou' else 'a'} {adjectives} {self.shape}"


@dataclass(frozen=True)
class ScenePrompt:
    """Prompt for an image: one group, or two with an optional relation of the first to the second."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def __str__(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(str(group) for group in self.groups)

    @property
    def category(self) -> str:
        """Category of the prompt, one of CATEGORIES."""
        if self.relation:
            return "relation"
        if len(self.groups) == 2:
            return "two"
        return "single" if self.groups[0].number == 1 else "count"


# ---------------------------------------------------------------------------------------------------------- prompts


@cache
def all_prompts() -> tuple[ScenePrompt, ...]:
    """Return every prompt of the world, in a fixed order."""
    kinds = list(itertools.product(COLOURS, SHAPES))
    prompts = [ScenePrompt((Group(1, c, s, size),)) for c, s in kinds for size in (None, *SIZES)]
    prompts += [ScenePrompt((Group(n, c, s),)) for c, s in kinds for n in NUMBERS.values()]
    for relation in (None, *RELATIONS):
        for a, b in itertools.permutations(kinds, 2):
            prompts.append(ScenePrompt((Group(1, *a), Group(1, *b)), relation))
    return tuple(prompts)


def split_of(prompt: ScenePrompt) -> Split:
    """Return a prompt's split, from a hash of its text: 70 % train, 10 % validation, 20 % test."""
    bucket = int.from_bytes(hashlib.sha256(str(prompt).encode()).digest()[:4], "big") % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


def sample_prompts(split: Split, number: int, seed: int) -> list[ScenePrompt]:
    """Return `number` prompts of a split, equally many of each category, shuffled by `seed`.

    A prompt repeats only after every other one of its category has occurred.
    """
    rng = np.random.default_rng(seed)
    pools = {c: [p for p in all_prompts() if p.category == c and split_of(p) == split] for c in CATEGORIES}
    chosen: list[ScenePrompt] = []
    for i, category in enumerate(CATEGORIES):
        # The first categories have the remainder
        wanted = number // len(CATEGORIES) + (i < number % len(CATEGORIES))
        pool = pools[category]
        # In rounds, each of which has a prompt at most once
        while wanted > 0:
            order = rng.permutation(len(pool))[:wanted]
            chosen += [pool[j] for j in order]
            wanted -= len(order)
    return [chosen[j] for j in rng.permutation(len(chosen))]


def sample_prompt_pairs(number: int, seed: int) -> list[tuple[ScenePrompt, ScenePrompt]]:
    """Return `number` training prompts, each with a training prompt that differs in one attribute, chosen by `seed`."""
    rng = np.random.default_rng([seed, number])
    known = {prompt for prompt in all_prompts() if split_of(prompt) == "train"}
    couples = []
    for prompt in sample_prompts("train", number, seed):
        other = corrupt(prompt, rng)
        while other not in known:  # held out, or two equal groups; most changes are neither
            other = corrupt(prompt, rng)
        couples.append((prompt, other))
    return couples


def parse(caption: str) -> ScenePrompt:
    """Parse a caption of this world.

    Raises:
        ValueError: the caption is not of this world.
    """
    for relation in (*RELATIONS, "and"):
        first, parts, second = caption.partition(f" {relation} ")
        if parts:
            return ScenePrompt((_parse_group(first), _parse_group(second)), None if relation == "and" else relation)
    return ScenePrompt((_parse_group(caption),))


def _parse_group(text: str) -> Group:
    pattern = rf"(an?|{'|'.join(NUMBERS)})(?: ({'|'.join(SIZES)}))? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?"
    match = re.fullmatch(pattern, text.strip().lower())
    if match is None:
        raise ValueError(
            f"scenes: cannot read {text!r}; expected words such as 'a small red circle' or 'two blue stars'"
        )
    number, size, colour, shape = match.groups()
    return Group(NUMBERS.get(number, 1), colour, shape, size)


def corrupt(prompt: ScenePrompt, rng: np.random.Generator) -> ScenePrompt:
    """Return the prompt with one random change: a colour, a shape, a number, a size, or the relation."""
    # Property to change
    ways = ["colour", "shape"]
    ways += ["number"] if prompt.category == "count" else []
    ways += ["size"] if prompt.groups[0].size else []
    ways += ["relation"] if prompt.relation else []
    way = ways[rng.integers(len(ways))]
    if way == "relation":
        return ScenePrompt(prompt.groups[::-1], prompt.relation)
    index = int(rng.integers(len(prompt.groups)))
    old = prompt.groups[index]
    # Another value of this property
    options: dict[str, list[str] | list[int]] = {
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "number": list(NUMBERS.values()),
        "size": list(SIZES),
    }
    others = [o for o in options[way] if o != getattr(old, way)]
    groups = list(prompt.groups)
    groups[index] = replace(old, **{way: others[rng.integers(len(others))]})  # type: ignore[arg-type]
    return ScenePrompt(tuple(groups), prompt.relation)


# ---------------------------------------------------------------------------------------------------------- drawing


def place_objects(prompt: ScenePrompt, rng: np.random.Generator) -> list[Object]:
    """Return exactly the objects that fulfil the prompt, at random separate positions."""
    wanted = [group for group in prompt.groups for _ in range(group.number)]
    # The largest radius with which so many objects still find a place
    largest = {1: 13.0, 2: 11.0, 3: 9.5, 4: 8.5}[len(wanted)]
    for _ in range(1000):
        radii = [rng.uniform(*SIZES[g.size]) if g.size else rng.uniform(6.5, largest) for g in wanted]
        centres = [rng.uniform(r + 1.5, CANVAS - r - 1.5, size=2) for r in radii]
        objects = [
            Object(g.shape, g.colour, float(c[0]), float(c[1]), float(r))
            for g, c, r in zip(wanted, centres, radii, strict=True)
        ]
        apart = all(
            max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + _GAP
            for a, b in itertools.combinations(objects, 2)
        )
        # With a margin, so that a reading of the image cannot miss the relation
        if apart and (prompt.relation is None or _holds(prompt.relation, objects[0], objects[1], margin=8.0)):
            return objects
    raise AssertionError(f"no layout for {prompt}")


def _holds(relation: str, a: Object, b: Object, margin: float = 0.0) -> bool:
    across, down = b.x - a.x, b.y - a.y
    if relation == "left of":
        return across > margin and across > abs(down) + margin / 4
    return down > margin and down > abs(across) + margin / 4


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the polygon of a shape, with its bounding box scaled to [-1, 1] x [-1, 1]."""
    turn = [2 * math.pi * k / 60 for k in range(60)]
    if shape == "circle":
        points = [(math.cos(a), math.sin(a)) for a in turn]
    elif shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        points = [(0, -1), (1, 1), (-1, 1)]
    elif shape == "star":
        radii = [1.0, 0.5] * 5
        points = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]
    elif shape == "cross":
        w = 0.34
        points = [(-w, -1), (w, -1), (w, -w)]
        for _ in range(3):  # a quarter turn at a time
            points += [(-y, x) for x, y in points[-3:]]
    elif shape == "heart":
        points = [
            (16 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)))
            for a in turn
        ]
    else:
        raise ValueError(f"scenes: unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
    # Scaled to the square from -1 to 1
    xs, ys = zip(*points, strict=True)
    cx, cy = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    sx, sy = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
    return [((x - cx) / sx, (y - cy) / sy) for x, y in points]


def render(objects: list[Object], scale: int = 4) -> Image.Image:
    """Return a 64 x 64 RGB image of the objects, painted `scale` times larger and reduced."""
    return paint([(o.shape, o.x, o.y, o.radius, COLOURS[o.colour]) for o in objects], scale)


def paint(shapes: Iterable[tuple[str, float, float, float, tuple[int, ...]]], scale: int) -> Image.Image:
    """Return a 64 x 64 RGB image of shapes, each given by its name, centre, radius and colour."""
    canvas = Image.new("RGB", (CANVAS * scale, CANVAS * scale), BACKGROUND)
    brush = ImageDraw.Draw(canvas)
    for shape, left, top, radius, ink in shapes:
        brush.polygon([((left + radius * x) * scale, (top + radius * y) * scale) for x, y in outline(shape)], fill=ink)
    return canvas.resize((CANVAS, CANVAS), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------------------- reading


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    """Return a 32 x 32 silhouette of every shape, filling its bounding box."""
    masks = {}
    for shape in SHAPES:
        picture = Image.new("L", (256, 256))
        ImageDraw.Draw(picture).polygon([(128 + 128 * x, 128 + 128 * y) for x, y in outline(shape)], fill=255)
        masks[shape] = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)) > 127
    return masks


def read(image: Image.Image) -> list[Object]:
    """Return the objects in an image; an object that matches no shape has the shape "unknown".

    Each pixel takes the nearest of the seven colours. Thin edges and specks are dropped from each colour's regions. The
    silhouette of every other region is compared with each shape's.
    """
    nearest = _nearest_colours(image)
    filled = nearest > 0
    objects = []
    for index, colour in enumerate(COLOURS, start=1):
        mask = nearest == index
        for region in _regions(mask):  # without the one-pixel edges where two colours blend
            # Restore thin points, and edge pixels that blending assigned to another colour
            silhouette = ndimage.binary_dilation(region, iterations=4, mask=mask)
            silhouette |= ndimage.binary_dilation(silhouette) & filled
            objects.append(_measure(silhouette, colour))
    return objects


def read_merged(image: Image.Image) -> list[Object]:
    """Return the objects in an image like `read`, but parts of several colours that touch are one object.

    The object takes the colour of most of its pixels. A generated heart with a tip of another colour is one object.
    """
    nearest = _nearest_colours(image)
    filled = nearest > 0
    objects = []
    for region in _regions(filled):
        colour = list(COLOURS)[int(np.bincount(nearest[region]).argmax()) - 1]
        objects.append(_measure(ndimage.binary_dilation(region, iterations=2, mask=filled), colour))
    return objects


def _nearest_colours(image: Image.Image) -> NDArray[np.intp]:
    """Return the index [64, 64] of every pixel's nearest palette colour; 0 is the background."""
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float32)
    nearest: NDArray[np.intp] = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    return nearest


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the connected regions of a mask without thin edges and specks."""
    regions, number = ndimage.label(ndimage.binary_opening(mask))
    masks = [regions == k for k in range(1, number + 1)]
    return [region for region in masks if region.sum() >= _MIN_AREA]


def _measure(mask: NDArray[np.bool_], colour: str) -> Object:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    shape = "unknown"
    # No shape is much longer than wide
    if 0.65 < width / height < 1.5:
        crop = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
        # By the overlap of silhouettes that fill their boxes: intersection over union
        silhouette = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR)) > 127
        overlap = {name: (silhouette & t).sum() / (silhouette | t).sum() for name, t in _templates().items()}
        best = max(overlap, key=lambda name: float(overlap[name]))
        shape = best if overlap[best] > 0.68 else "unknown"
    return Object(shape, colour, float(left + right) / 2, float(top + bottom) / 2, float(max(width, height)) / 2)


def check(prompt: ScenePrompt, objects: list[Object]) -> Truth:
    """Check the parts of the prompt against the objects; "correct" holds if they fulfil all of it.

    "count": the number of objects. "colour" and "shape": the objects' colours and shapes, in any combination. "size"
    and "relation" are present only if the prompt names one. "correct" needs every object to be right as a whole.
    """
    wanted = [group for group in prompt.groups for _ in range(group.number)]
    # Properties of all prompts
    kinds = sorted((g.colour, g.shape) for g in wanted)
    truth: Truth = {
        "count": len(objects) == len(wanted),
        "colour": sorted(o.colour for o in objects) == sorted(g.colour for g in wanted),
        "shape": sorted(o.shape for o in objects) == sorted(g.shape for g in wanted),
    }
    # Properties of some prompts
    exact = sorted((o.colour, o.shape) for o in objects) == kinds
    size = prompt.groups[0].size
    if size:
        truth["size"] = bool(objects) and all((o.radius < SIZE_BOUNDARY) == (size == "small") for o in objects)
    if prompt.relation:
        first, second = prompt.groups
        a = [o for o in objects if (o.colour, o.shape) == (first.colour, first.shape)]
        b = [o for o in objects if (o.colour, o.shape) == (second.colour, second.shape)]
        truth["relation"] = len(a) == len(b) == 1 and _holds(prompt.relation, a[0], b[0])
    truth["correct"] = exact and all(truth.values())
    return truth
