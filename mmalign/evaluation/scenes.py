"""How well pictures follow prompts of the bundled world, by its exact reader, which no judge can flatter.

N images, the i-th of `prompts[i]`. An attribute is measured over the prompts that name it: every prompt names a number,
a colour and a shape, some a size or a relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from mmalign.data.scenes import ATTRIBUTES, CATEGORIES, Truth, check, parse, read
from mmalign.evaluation.intervals import Interval, paired_difference, proportion


@dataclass(frozen=True)
class Accuracy:
    """`right` of `number` images; the interval (Wilson, 95 %) takes them as independent."""

    right: int
    number: int

    @property
    def interval(self) -> Interval:
        """The share of right images in [0, 1]."""
        return proportion(self.right, self.number)


@dataclass(frozen=True)
class SceneReport:
    """Accuracies of one set of images; a category or attribute that no prompt has is left out."""

    overall: Accuracy
    by_category: dict[str, Accuracy]
    by_attribute: dict[str, Accuracy]


@dataclass(frozen=True)
class SceneComparison:
    """Two reports of the same prompts and seeds, and the paired differences (after - before, 95 %, by prompt).

    A category or attribute with a single prompt has no difference: one prompt does not say how others would do.
    """

    before: SceneReport
    after: SceneReport
    difference: Interval
    difference_by_category: dict[str, Interval]
    difference_by_attribute: dict[str, Interval]

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text in percent, the header first: what, images, before, after, change."""
        return [
            ("prompts fulfilled", "images", "before, %", "after, %", "change, points [95 % interval]"),
            _row("all", self.before.overall, self.after.overall, self.difference),
            *_rows("category", self.before.by_category, self.after.by_category, self.difference_by_category),
            *_rows("attribute", self.before.by_attribute, self.after.by_attribute, self.difference_by_attribute),
        ]

    def as_dict(self) -> dict[str, object]:
        """Numbers for `result.json`; shares and differences in [-1, 1], `null` where there is no difference."""
        before, after = self.before, self.after
        return {
            "overall": _record(before.overall, after.overall, self.difference),
            "by_category": {
                name: _record(accuracy, after.by_category[name], self.difference_by_category.get(name))
                for name, accuracy in before.by_category.items()
            },
            "by_attribute": {
                name: _record(accuracy, after.by_attribute[name], self.difference_by_attribute.get(name))
                for name, accuracy in before.by_attribute.items()
            },
        }


def score_scenes(images: Sequence[Image], prompts: Sequence[str]) -> list[Truth]:
    """[N] which parts of its prompt each image fulfils, as `mmalign.data.scenes.check` says.

    Raises:
        ValueError: the numbers differ, or a prompt is not of the bundled world.
    """
    _same_number("images", len(images), prompts)
    return [check(parse(prompt), read(image)) for image, prompt in zip(images, prompts, strict=True)]


def describe(truth: Truth) -> str:
    """A note for people: "correct", or what is wrong, such as "colour, shape wrong".

    A wrong number makes the lists of colours and of shapes differ too, and a wrong colour or shape leaves no pair to be
    in relation; what only follows from another fault is not named.
    """
    if truth["correct"]:
        return "correct"
    wrong = [name for name in ATTRIBUTES if not truth.get(name, True)]
    if "count" in wrong:
        wrong = [name for name in wrong if name not in ("colour", "shape", "relation")]
    elif {"colour", "shape"} & set(wrong):
        wrong = [name for name in wrong if name != "relation"]
    return f"{', '.join(wrong)} wrong" if wrong else "colours and shapes swapped"


def report_scenes(truths: Sequence[Truth], prompts: Sequence[str]) -> SceneReport:
    """The accuracies of N images.

    Raises:
        ValueError: the numbers differ, there is no image, or a prompt is not of the bundled world.
    """
    _same_number("truths", len(truths), prompts)
    by_category = {name: _accuracy(truths, rows, "correct") for name, rows in _categories(prompts).items()}
    by_attribute = {name: _accuracy(truths, rows, name) for name, rows in _attributes(truths).items()}
    return SceneReport(_accuracy(truths, range(len(truths)), "correct"), by_category, by_attribute)


def compare_scenes(before: Sequence[Truth], after: Sequence[Truth], prompts: Sequence[str]) -> SceneComparison:
    """What changed from `before` to `after`, both [N] of the same prompts and seeds in the same order.

    Raises:
        ValueError: the numbers differ, there are fewer than two different prompts, or one is not of the bundled world.
    """
    reports = report_scenes(before, prompts), report_scenes(after, prompts)

    def difference(rows: Sequence[int], name: str) -> Interval:
        first, second = ([float(truths[i][name]) for i in rows] for truths in (before, after))
        return paired_difference(first, second, [prompts[i] for i in rows])

    def several(rows: Sequence[int]) -> bool:
        return len({prompts[i] for i in rows}) > 1

    return SceneComparison(
        *reports,
        difference(range(len(prompts)), "correct"),
        {name: difference(rows, "correct") for name, rows in _categories(prompts).items() if several(rows)},
        {name: difference(rows, name) for name, rows in _attributes(before).items() if several(rows)},
    )


def _categories(prompts: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each category that occurs."""
    found = [parse(prompt).category for prompt in prompts]
    return {name: [i for i, category in enumerate(found) if category == name] for name in CATEGORIES if name in found}


def _attributes(truths: Sequence[Truth]) -> dict[str, list[int]]:
    """The rows of each attribute that a prompt names."""
    rows = {name: [i for i, truth in enumerate(truths) if name in truth] for name in ATTRIBUTES}
    return {name: found for name, found in rows.items() if found}


def _accuracy(truths: Sequence[Truth], rows: Sequence[int], name: str) -> Accuracy:
    if not rows:
        raise ValueError("scenes: no image to measure; expected at least one image with its prompt")
    return Accuracy(sum(truths[i][name] for i in rows), len(rows))


def _same_number(what: str, number: int, prompts: Sequence[str]) -> None:
    if number != len(prompts):
        raise ValueError(f"scenes: {number} {what} for {len(prompts)} prompts; expected one for each prompt")


def _row(name: str, before: Accuracy, after: Accuracy, difference: Interval | None) -> tuple[str, ...]:
    change = difference.points() if difference else "one prompt only"
    shares = (accuracy.interval.points(signed=False) for accuracy in (before, after))
    return (name, str(before.number), *shares, change)


def _rows(
    kind: str, before: dict[str, Accuracy], after: dict[str, Accuracy], differences: dict[str, Interval]
) -> list[tuple[str, ...]]:
    return [_row(f"{kind}: {name}", before[name], after[name], differences.get(name)) for name in before]


def _record(before: Accuracy, after: Accuracy, difference: Interval | None) -> dict[str, object]:
    return {
        "number": before.number,
        "before": before.interval.as_dict(),
        "after": after.interval.as_dict(),
        "difference": difference.as_dict() if difference else None,
    }
