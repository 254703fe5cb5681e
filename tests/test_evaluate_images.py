"""The overall number of pictures, by which several runs are compared."""

from typing import Any

import pytest

from mmalign.evaluate_images import count_images


def samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two seeds of the first prompt and one of the second."""
    prompts = [("a fox", 0), ("a fox", 1), ("a car", 2)]
    return [
        {"prompt": p, "seed": s, "before": b, "after": a} for (p, s), b, a in zip(prompts, before, after, strict=True)
    ]


def test_scenes_are_counted_where_all_of_a_prompt_is_right() -> None:
    def told(right: bool) -> dict[str, Any]:
        return {"score": 0.75, "note": "", "right": right}

    before, after = count_images(
        samples([told(r) for r in (True, False, False)], [told(r) for r in (True, True, False)])
    )
    assert (before.values, after.values) == (
        {"prompts drawn right": pytest.approx(1 / 3)},
        {"prompts drawn right": pytest.approx(2 / 3)},
    )
    assert before.groups == ("a fox", "a fox", "a car") and len(set(before.keys)) == 3


def test_scores_are_counted_as_wins_over_the_base() -> None:
    """A win, a tie, a loss: half of the comparisons are won; the mean score falls from 2 to 5/3."""

    def told(score: float) -> dict[str, Any]:
        return {"score": score, "note": ""}

    before, after = count_images(samples([told(s) for s in (1.0, 2.0, 3.0)], [told(s) for s in (2.0, 2.0, 1.0)]))
    assert before.values == {"win rate": 0.5, "mean score": 2.0}
    assert after.values == {"win rate": 0.5, "mean score": pytest.approx(5 / 3)}
    _, better = count_images(samples([told(0.0)] * 3, [told(s) for s in (1.0, 1.0, 0.0)]))
    assert better.values["win rate"] == pytest.approx(2.5 / 3)
