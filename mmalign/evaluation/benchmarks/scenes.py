"""Accuracy of images generated from the bundled world's prompts, by its exact reader, without a reward model.

Shapes: N images, the i-th of `prompts[i]`. An attribute is measured over the prompts that name it. Every prompt names a
count, a colour and a shape; some name a size or a relation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from PIL.Image import Image

from mmalign.evaluation.metrics import Metrics, Table, ratio
from mmalign.evaluation.statistics import paired_difference, proportion
from mmalign.toy.scenes import ATTRIBUTES, CATEGORIES, Truth, check, parse, read, read_merged

OVERALL = "prompts rendered correctly"


def check_scenes(images: Sequence[Image], prompts: Sequence[str]) -> list[Truth]:
    """Check each image against the parts of its prompt (`mmalign.toy.scenes.check`), by its nearest reading.

    `read` alone decides whether an image is correct. In any other image, touching parts may be one object, and the
    reading that fulfils more parts counts. A stained cross for a heart has a wrong shape, not a wrong count. If nothing
    but a stain is wrong, the colour is.

    Raises:
        ValueError: a prompt is not of the bundled world.
    """
    return [_check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def _check(image: Image, prompt: str) -> Truth:
    exact = check(parse(prompt), read(image))
    if exact["correct"]:
        return exact
    merged = check(parse(prompt), read_merged(image))
    if merged["correct"]:
        merged |= {"colour": False, "correct": False}
    return max(exact, merged, key=lambda truth: sum(truth.values()))  # the first one of equals


def describe(truth: Truth) -> str:
    """Return "correct", or a list of errors such as "colour, shape wrong".

    An error that follows from another one is not named. A wrong count makes the lists of colours and of shapes differ
    too. A wrong colour or shape leaves no pair to check a relation of.
    """
    if truth["correct"]:
        return "correct"
    wrong = [name for name in ATTRIBUTES if not truth.get(name, True)]
    if "count" in wrong:
        wrong = [name for name in wrong if name not in ("colour", "shape", "relation")]
    elif {"colour", "shape"} & set(wrong):
        wrong = [name for name in wrong if name != "relation"]
    return f"{', '.join(wrong)} wrong" if wrong else "colours and shapes swapped"


def measure_scenes(truths: Sequence[Truth], keys: tuple[Hashable, ...], prompts: Sequence[str]) -> Metrics:
    """Return the accuracy of N images: overall, by category of prompt, and by attribute.

    Categories and attributes that no prompt has are left out.

    Raises:
        ValueError: there is no image, or a prompt is not of the bundled world.
    """
    # Counts overall, by attribute and by category
    right = np.array([float(truth["correct"]) for truth in truths])
    columns, ratios = {"images": np.ones(len(truths)), "right": right}, {OVERALL: ratio("right", "images")}
    categories = [parse(prompt).category for prompt in prompts]
    for name in ATTRIBUTES:
        columns[f"{name} named"] = np.array([float(name in truth) for truth in truths])
        columns[f"{name} right"] = np.array([float(truth.get(name, False)) for truth in truths])
    for name in CATEGORIES:
        columns[f"category {name} named"] = np.array([float(category == name) for category in categories])
        columns[f"category {name} right"] = columns[f"category {name} named"] * right
    # Ratios of those that a prompt has
    names = (*ATTRIBUTES, *(f"category {name}" for name in CATEGORIES))
    ratios |= {name: ratio(f"{name} right", f"{name} named") for name in names if columns[f"{name} named"].any()}
    headline = tuple(name for name in ratios if not name.startswith("category "))
    return Metrics("scenes", keys, tuple(prompts), columns, ratios, headline=headline)


def compare_scenes(before: Metrics, after: Metrics) -> tuple[dict[str, object], Table]:
    """Return the result of benchmark scenes for result.json, and its table.

    Accuracies and paired differences have intervals clustered by prompt. A category or attribute with a
    single prompt has no difference.

    Raises:
        ValueError: there are fewer than two prompts.
    """
    prompts = before.groups
    table: Table = [("prompts fulfilled", "images", "before, %", "after, %", "change, points [95 % interval]")]

    def compare_accuracies(label: str, part: str, whole: str) -> dict[str, object]:
        """Add a row to the table, and return its numbers."""
        # Images whose prompts have this part
        rows = np.flatnonzero(before.columns[whole])
        outcomes = before.columns[part][rows], after.columns[part][rows]
        groups = [prompts[row] for row in rows]
        accuracies = [proportion(outcome, groups) for outcome in outcomes]
        several = label == "all" or len(set(groups)) > 1
        difference = paired_difference(*outcomes, groups=groups) if several else None
        cells = [accuracy.points(signed=False) for accuracy in accuracies]
        table.append((label, str(len(rows)), *cells, difference.points() if difference else "one prompt only"))
        return {
            "number": len(rows),
            "before": accuracies[0].as_dict(),
            "after": accuracies[1].as_dict(),
            "difference": difference.as_dict() if difference else None,
        }

    result: dict[str, object] = {"overall": compare_accuracies("all", "right", "images")}
    for kind, names, prefix in (("category", CATEGORIES, "category "), ("attribute", ATTRIBUTES, "")):
        result[f"by_{kind}"] = {
            name: compare_accuracies(f"{kind}: {name}", f"{prefix}{name} right", f"{prefix}{name} named")
            for name in names
            if f"{prefix}{name}" in before.ratios
        }
    return result, table
