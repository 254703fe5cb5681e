"""Evaluation of text-to-image models: metrics of samples, and the command on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageStat

import mmalign
from mmalign.commands.compare import compare
from mmalign.commands.load_recipe import load_recipe
from mmalign.families.diffusion.pipeline import LatentModel
from mmalign.modalities.text_to_image.evaluate import measure_samples
from tests.helpers import data_files, recipes


def samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two seeds of the first prompt and one of the second."""
    prompts = [("a red circle", 0), ("a red circle", 1), ("two blue stars", 2)]
    return [
        {"prompt": p, "seed": s, "before": b, "after": a} for (p, s), b, a in zip(prompts, before, after, strict=True)
    ]


def test_scene_metrics_count_images_with_every_part_right() -> None:
    """An attribute's accuracy is over the images whose prompt names it."""

    def record(right: bool, **named: bool) -> dict[str, Any]:
        return {"parts": {"correct": right, "count": True, **named}}

    (before,), (after,) = measure_samples(
        samples(
            [record(True, size=True), record(False, size=False), record(False)],
            [record(True, size=True), record(True, size=True), record(False)],
        )
    )
    headlines = [{name: metrics.values[name] for name in metrics.headline_names} for metrics in (before, after)]
    assert headlines[0] == {"prompts rendered correctly": pytest.approx(1 / 3), "count": 1, "size": 0.5}
    assert headlines[1] == {"prompts rendered correctly": pytest.approx(2 / 3), "count": 1, "size": 1}
    assert before.groups == ("a red circle", "a red circle", "two blue stars") and len(set(before.keys)) == 3


def test_reward_metrics_count_wins_over_the_base() -> None:
    """A win, a tie, a loss: half of the comparisons are won; the mean score falls from 2 to 5/3."""

    def records(*rewards: float) -> list[dict[str, Any]]:
        return [{"judged": reward} for reward in rewards]

    (before,), (after,) = measure_samples(samples(records(1, 2, 3), records(2, 2, 1)))
    assert before.values == {"win rate": 0.5, "mean score": 2.0}
    assert after.values == {"win rate": 0.5, "mean score": pytest.approx(5 / 3)}
    _, (better,) = measure_samples(samples(records(0, 0, 0), records(1, 1, 0)))
    assert better.values["win rate"] == pytest.approx(2.5 / 3)


def test_metrics_are_those_that_samples_have() -> None:
    record = {"parts": {"correct": True}, "judged": 2.0, "apart": 0.25}
    before, after = measure_samples(samples([record] * 3, [{**record, "apart": 0.5}] * 3))
    assert [metrics.benchmark for metrics in before] == ["scenes", "preference", "diversity"]
    assert (before[2].values, after[2].values) == ({"diversity": 0.25}, {"diversity": 0.5})


@pytest.mark.slow
def test_scenes_with_a_reward_and_several_images_a_prompt(tiny_sd15: Path, tmp_path: Path) -> None:
    """One evaluation holds the exact reader's numbers, the judge's, and the diversity; no two pictures share a seed."""
    evaluate = {
        "benchmark": "scenes",
        "prompts": 3,
        "images_per_prompt": 2,
        "reward": [{"path": "models/tiny_clip"}, {"path": "models/tiny_clip_eval", "weight": 2.0}],
        "combine": "zscore",
        "sampling": {"steps": 1, "guidance": 1.0},
    }
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    recipe = load_recipe(recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"steps": 1}, evaluate=evaluate))
    mmalign.train(recipe)
    done = mmalign.evaluate(recipe)
    samples = json.loads((done.folder / "samples.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples[::2]] == [sample["prompt"] for sample in samples[1::2]]
    assert len({sample["seed"] for sample in samples}) == len(samples) == 6
    assert {row[0] for row in done.table} >= {"all", "win rate, %", "mean score", "diversity, %"}
    assert {len(row) for row in done.table} == {5}
    judged = [sample[side]["judged"] for side in ("before", "after") for sample in samples]
    assert sum(judged) == pytest.approx(0, abs=1e-4)  # standard scores of both models' images together
    assert len(list((tmp_path / "out" / "drawings" / "scores").glob("*.jsonl"))) == 2
    change = done.result["diversity"]["difference"]["diversity"]["estimate"]
    apart = [sum(sample[side]["apart"] for sample in samples) / 6 for side in ("before", "after")]
    assert change == pytest.approx(apart[1] - apart[0])
    assert done.result["preference"]["after"]["measures"]["mean score"]["estimate"] == pytest.approx(
        sum(sample["after"]["judged"] for sample in samples) / 6
    )


@pytest.mark.slow
def test_best_of_n_is_chosen_by_one_judge_and_measured_by_the_reader(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge likes dark images: the darkest of two and of four, measured beside the trained model in the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dark.py").write_text(
        "from PIL import ImageStat\n"
        "def dark(images, prompts):\n"
        "    return [-ImageStat.Stat(image.convert('L')).mean[0] for image in images]\n"
    )
    evaluate = {
        "benchmark": "scenes",
        "prompts": 3,
        "best_of": {"n": [4, 2], "reward": {"name": "function", "path": "dark:dark"}},
        "reward": {"path": "models/tiny_clip"},
        "sampling": {"steps": 1, "guidance": 1.0},
    }
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"steps": 1}, evaluate=evaluate)
    source = tmp_path / "dpo.yaml"
    source.write_text(yaml.safe_dump(content))
    base, dpo, best_of_2, best_of_4 = compare([str(source)], seeds=2, output=tmp_path / "compared")
    folder = tmp_path / "compared" / "dpo" / "seed-0" / "evaluation"

    def brightness(side: str) -> Any:
        files = sorted((folder / side).iterdir())
        return np.array([ImageStat.Stat(Image.open(file).convert("L")).mean[0] for file in files])

    before, two, four = brightness("before"), brightness("best-of-2"), brightness("best-of-4")
    assert (four <= two).all() and (two <= before).all() and four.sum() < before.sum()
    result = json.loads((folder / "result.json").read_text())
    assert result["best_of"]["4"]["kl_bound"] == pytest.approx(0.636294361) and "preference" in result["best_of"]["2"]
    assert [row.name for row in (base, dpo, best_of_2, best_of_4)] == ["base", "dpo", "best of 2", "best of 4"]
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    share = sum(sample["best_of"]["4"]["parts"]["correct"] for sample in samples) / 3
    assert best_of_4.as_dict()["measures"]["prompts rendered correctly"]["estimate"] == pytest.approx(share)
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert "| best of 4 | KL <= 0.64 nats | 2 | 0 | 0 |" in table and "best of 4 - dpo" in table


@pytest.mark.slow
def test_cached_images_are_not_generated_again(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated twice, and then with other drawing: only the latter draws, and both models."""
    evaluate = {"benchmark": "scenes", "prompts": 3, "sampling": {"steps": 1, "guidance": 1.0, "batch_size": 2}}
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"steps": 1}, evaluate=evaluate)
    mmalign.train(load_recipe(content))
    calls: list[int] = []
    sample = LatentModel.sample

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments))
        return sample(*arguments)

    monkeypatch.setattr(LatentModel, "sample", counted)
    first = mmalign.evaluate(load_recipe(content))
    assert len(calls) == 4  # two batches of each model
    assert mmalign.evaluate(load_recipe(content)).table == first.table and len(calls) == 4
    mmalign.evaluate(load_recipe(content, ["evaluate.sampling.guidance=2.0"]))
    assert len(calls) == 8
