"""Audit of a judge, against numbers worked out by hand."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mmalign.data.label import NO_LABEL, Label
from mmalign.data.pairs import ImagePair, ImageRef
from mmalign.evaluation import judged_rows
from mmalign.evaluation.benchmarks import judge
from mmalign.evaluation.judged_rows import JudgedRow, judge_rows


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def ref(key: str, data: bytes = b"") -> ImageRef:
    return ImageRef(key, lambda: key, lambda: data)


def pair(number: int, label: Label = NO_LABEL, scores: tuple[float, ...] = (), prompt: str = "") -> ImagePair:
    outputs = tuple(ref(f"{number}-{place}") for place in range(len(scores) or 2))
    prompt = prompt or f"prompt {number}"
    return ImagePair(number, prompt, outputs, lambda: f"row {number}", prompt, label=label, scores=scores)


def row(number: int, after: list[float], other: list[float] | None = None, **properties: list[float]) -> JudgedRow:
    others = {"other": other} if other is not None else {}
    return JudgedRow(number, {"before": [0.0] * len(after), "after": after, **others}, properties)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_accuracy_log_loss_and_calibration_by_hand() -> None:
    """Four pairs at 80 %, of which one is lost, and a tie of the labels at 60 %, which only calibration counts."""
    labels = [NO_LABEL, NO_LABEL, Label(preference=0.0), NO_LABEL, Label(preference=0.5)]
    sides = [[logit(0.8), 0.0], [logit(0.8), 0.0], [0.0, logit(0.8)], [0.0, logit(0.8)], [logit(0.6), 0.0]]
    pairs = [pair(number, label) for number, label in enumerate(labels)]
    comparisons = judge.compare_images(pairs, [row(number, after) for number, after in enumerate(sides)])
    metrics = judge.measure(comparisons, "after")
    assert metrics.values["accuracy"] == 0.75
    losses = [-math.log(0.8)] * 3 + [-math.log(0.2), -(math.log(0.6) + math.log(0.4)) / 2]
    assert metrics.values["log loss"] == pytest.approx(sum(losses) / 5)
    before, after, change = judge.calibration_errors(comparisons, 10)
    assert after.estimate == pytest.approx((abs(3 - 4 * 0.8) + abs(0.5 - 0.6)) / 5)
    assert before.estimate == pytest.approx(0) and change.estimate == pytest.approx(after.estimate)
    result, table = judge.audit(comparisons, 10)
    assert [part["pairs"] for part in result["reliability"]] == [1, 4]  # type: ignore[attr-defined]
    assert judge.measure(comparisons, "before").values["accuracy"] == 0.5  # ties of the judge are half right
    assert {len(cells) for cells in table} == {4}


def test_strata_follow_certainty_annotator_and_prompt() -> None:
    labels = [Label(preference=0.6, annotator="ann"), Label(annotator="ann"), Label(), Label(preference=0.7)]
    prompts = ["a", "b", "a long prompt", "a longer prompt still"]
    pairs = [pair(number, label, prompt=prompts[number]) for number, label in enumerate(labels)]
    rows = [row(number, after) for number, after in enumerate([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])]
    values = judge.measure(judge.compare_images(pairs, rows), "after").values
    assert {name: value for name, value in values.items() if name.startswith("accuracy, ")} == {
        "accuracy, annotator ann": 0.5,
        "accuracy, labels up to 100 % sure": 0.5,
        "accuracy, labels up to 75 % sure": 1.0,
        "accuracy, prompts of over 2 words": 1.0,
        "accuracy, prompts of up to 2 words": 0.5,
    }


def test_agreement_does_not_depend_on_the_order_of_the_sides() -> None:
    """Three equal verdicts of four: by chance half, so kappa is 1/2; a tie of one judge equals no verdict."""
    after = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    other = [[3.0, 2.0], [3.0, 2.0], [2.0, 3.0], [2.0, 3.0]]
    pairs = [pair(number) for number in range(4)]
    swapped = [pair(number, Label(preference=0.0)) for number in range(4)]
    for own, turn in ((pairs, 1), (swapped, -1)):
        rows = [row(n, a[::turn], b[::turn]) for n, (a, b) in enumerate(zip(after, other, strict=True))]
        comparisons = judge.compare_images(own, rows)
        equal, kappa = judge.agreement(comparisons, "after", "other")
        assert (equal.estimate, kappa.estimate) == (0.75, pytest.approx(0.5))
        assert judge.agreement(comparisons, "after", "labels")[0].estimate == 0.75
    tied = [row(n, a, b) for n, (a, b) in enumerate(zip(after, [[1.0, 1.0], *other[1:]], strict=True))]
    equal, kappa = judge.agreement(judge.compare_images(pairs, tied), "after", "other")
    # Both sides are equally likely: chance is 1/2 without the quarter of ties
    assert equal.estimate == 0.5 and kappa.estimate == pytest.approx((0.5 - 0.75 / 2) / (1 - 0.75 / 2))


def test_properties_that_differ_are_compared() -> None:
    """The judge takes the brighter image in two of three pairs, the labels in one."""
    bright = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.5, 0.5]]
    after = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    rows = [row(n, a, brightness=b, pixels=[64.0, 64.0]) for n, (a, b) in enumerate(zip(after, bright, strict=True))]
    comparisons = judge.compare_images([pair(number) for number in range(4)], rows)
    assert judge.measure(comparisons, "after").values["choice of more brightness"] == pytest.approx(2 / 3)
    result, _ = judge.audit(comparisons, 10)
    (name, part), *none = result["properties"].items()  # type: ignore[attr-defined]
    assert (name, part["pairs"], none) == ("brightness", 3, []) and part["labels"]["estimate"] == pytest.approx(1 / 3)
    expected = stats.spearmanr(np.ravel(bright), np.ravel(after)).statistic
    assert part["correlation"]["estimate"] == pytest.approx(expected)


def test_lists_are_compared_two_by_two() -> None:
    pairs = [pair(0, scores=(3.0, 2.0, 2.0)), pair(1, scores=(1.0, 0.0))]
    comparisons = judge.compare_images(pairs, [row(0, [1.0, 2.0, 0.0]), row(1, [1.0, 0.0])])
    assert comparisons.keys == ((0, 0, 1), (0, 0, 2), (1, 0, 1))  # equal scores are not compared
    assert comparisons.verdicts("after").tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="has 0 pairs, of fewer than two groups"):
        judge.compare_images(pairs, [])


def test_properties_of_known_images() -> None:
    half = Image.new("RGB", (4, 2))
    half.paste((255, 255, 255), (0, 0, 2, 2))
    gray = judged_rows.measure(half, 7)
    assert gray == {"brightness": 0.5, "contrast": 0.5, "colourfulness": 0.0, "pixels": 8.0, "file size": 7.0}
    red = judged_rows.measure(Image.new("RGB", (2, 2), (255, 0, 0)), 1)  # rg = 1, yb = 1/2, without any spread
    assert red["colourfulness"] == pytest.approx(0.3 * math.hypot(1, 0.5)) and red["contrast"] == 0


def test_processes_judge_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each judges its batches; together they have the rows of one process, in order."""
    data = png()
    pairs = [ImagePair(n, f"p{n}", (ref("a", data), ref("b", data)), lambda: "row", "p") for n in range(5)]

    class First:
        """The first of two processes, which gathers what the second one judges."""

        def is_mine(self, index: int) -> bool:
            return index % 2 == self.rank

        def gather(self, value: Any) -> list[Any]:
            if self.rank == 1:
                shares.append(value)
                return [value]
            return [value, *shares]

        def __init__(self, rank: int) -> None:
            self.rank = rank

    judged, shares = list[str](), list[Any]()

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        judged.extend(prompts)
        return torch.arange(len(images))

    for rank in (1, 0):
        monkeypatch.setattr(judged_rows, "current_processes", lambda rank=rank: First(rank))
        rows = judge_rows(pairs, lambda images, texts, _: {"after": score(images, texts)}, batch_size=2)
    assert [one.number for one in rows] == [0, 1, 2, 3, 4]
    assert judged == ["p2"] * 2 + ["p3"] * 2 + ["p0"] * 2 + ["p1"] * 2 + ["p4"] * 2


def test_rows_with_an_unreadable_image_are_named(log_lines: list[str]) -> None:
    outputs = [(ref("a", png()), ref("b", data)) for data in (png(), b"no image")]
    pairs = [ImagePair(n, "p", both, lambda: "row", "p") for n, both in enumerate(outputs)]
    rows = judge_rows(pairs, lambda images, *_: {"after": torch.arange(len(images))}, batch_size=2)
    assert [(one.number, one.scores["after"]) for one in rows] == [(0, [0, 1])]
    assert any("1 images cannot be read" in line for line in log_lines)
