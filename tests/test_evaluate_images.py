"""What is measured of pictures, and counted to compare several runs by."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import mmalign
from mmalign.evaluate_images import count_images
from mmalign.families import latents
from mmalign.recipe import load_recipe


def samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two seeds of the first prompt and one of the second."""
    prompts = [("a fox", 0), ("a fox", 1), ("a car", 2)]
    return [
        {"prompt": p, "seed": s, "before": b, "after": a} for (p, s), b, a in zip(prompts, before, after, strict=True)
    ]


def test_scenes_are_counted_where_all_of_a_prompt_is_right() -> None:
    """A colour that one prompt names alone is a share of that prompt's pictures."""

    def told(right: bool, **named: bool) -> dict[str, Any]:
        return {"score": 0.75, "note": "", "parts": {"correct": right, "count": True, **named}}

    (before,), (after,) = count_images(
        samples(
            [told(True, colour=True), told(False, colour=False), told(False)],
            [told(True, colour=True), told(True, colour=True), told(False)],
        )
    )
    assert before.values == {"prompts drawn right": pytest.approx(1 / 3), "count": 1, "colour": 0.5}
    assert after.values == {"prompts drawn right": pytest.approx(2 / 3), "count": 1, "colour": 1}
    assert before.groups == ("a fox", "a fox", "a car") and len(set(before.keys)) == 3


def test_scores_are_counted_as_wins_over_the_base() -> None:
    """A win, a tie, a loss: half of the comparisons are won; the mean score falls from 2 to 5/3."""

    def told(score: float) -> dict[str, Any]:
        return {"score": score, "note": "", "judged": score}

    (before,), (after,) = count_images(samples([told(s) for s in (1.0, 2.0, 3.0)], [told(s) for s in (2.0, 2.0, 1.0)]))
    assert before.values == {"win rate": 0.5, "mean score": 2.0}
    assert after.values == {"win rate": 0.5, "mean score": pytest.approx(5 / 3)}
    _, (better,) = count_images(samples([told(0.0)] * 3, [told(s) for s in (1.0, 1.0, 0.0)]))
    assert better.values["win rate"] == pytest.approx(2.5 / 3)


def test_all_that_is_known_is_counted_apart() -> None:
    told = {"score": 1.0, "note": "", "parts": {"correct": True}, "judged": 2.0, "apart": 0.25}
    before, after = count_images(samples([told] * 3, [{**told, "apart": 0.5}] * 3))
    assert [counts.benchmark for counts in before] == ["scenes", "preference", "diversity"]
    assert (before[2].values, after[2].values) == ({"diversity": 0.25}, {"diversity": 0.5})


def test_scenes_with_a_judge_and_several_pictures_of_a_prompt(tiny_sd15: Path, tmp_path: Path) -> None:
    """One evaluation holds the exact reader's numbers, the judge's, and the diversity; no two pictures share a seed."""
    evaluate = {
        "benchmark": "scenes",
        "prompts": 3,
        "per_prompt": 2,
        "judge": {"path": "models/tiny_clip"},
        "drawing": {"steps": 1, "guidance": 1.0},
    }
    pairs = tiny.pick_a_pic(tmp_path / "pairs.parquet")
    recipe = load_recipe(tiny.recipe(tiny_sd15, pairs, tmp_path / "out", train={"steps": 1}, evaluate=evaluate))
    mmalign.train(recipe)
    done = mmalign.evaluate(recipe)
    told = json.loads((done.folder / "samples.json").read_text())["samples"]
    assert [one["prompt"] for one in told[::2]] == [one["prompt"] for one in told[1::2]]
    assert len({one["seed"] for one in told}) == len(told) == 6
    assert {row[0] for row in done.table} >= {"all", "win rate, %", "mean score", "diversity, %"}
    assert {len(row) for row in done.table} == {5}
    change = done.result["diversity"]["difference"]["diversity"]["estimate"]
    apart = [sum(one[side]["apart"] for one in told) / 6 for side in ("before", "after")]
    assert change == pytest.approx(apart[1] - apart[0])
    assert done.result["preference"]["after"]["measures"]["mean score"]["estimate"] == pytest.approx(
        sum(one["after"]["judged"] for one in told) / 6
    )


def test_what_was_drawn_is_not_drawn_again(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated twice, and then with other drawing: only the latter draws, and both models."""
    evaluate = {"benchmark": "scenes", "prompts": 3, "drawing": {"steps": 1, "guidance": 1.0, "batch_size": 2}}
    pairs = tiny.pick_a_pic(tmp_path / "pairs.parquet")
    content = tiny.recipe(tiny_sd15, pairs, tmp_path / "out", train={"steps": 1}, evaluate=evaluate)
    mmalign.train(load_recipe(content))
    calls: list[int] = []
    sample = latents.sample

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments))
        return sample(*arguments)

    monkeypatch.setattr(latents, "sample", counted)
    first = mmalign.evaluate(load_recipe(content))
    assert len(calls) == 4  # two batches of each model
    assert mmalign.evaluate(load_recipe(content)).table == first.table and len(calls) == 4
    mmalign.evaluate(load_recipe(content, ["evaluate.drawing.guidance=2.0"]))
    assert len(calls) == 8
