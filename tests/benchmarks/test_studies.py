"""Studies of judged outputs: their data and recipes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.commands.load_recipe import load_recipe
from mmalign.data.formats.images import open_pairs
from mmalign.synthesis.write_image_pairs import write_pairs
from mmalign.toy import scenes
from tests.benchmarks.studies import PAIRS, STUDIES, parse, search, select
from tests.benchmarks.study_data import chance, flip_labels, write_best_and_worst, write_objectives


def test_flipped_labels_swap_both_columns(tmp_path: Path) -> None:
    number = flip_labels(PAIRS, tmp_path / "flipped.parquet", 0.2)
    before, after = (pq.read_table(path).to_pylist() for path in (PAIRS, tmp_path / "flipped.parquet"))
    swapped = [a for a, b in zip(before, after, strict=True) if a != b]
    assert len(swapped) == number and 0.15 < number / len(before) < 0.25
    for a, b in zip(before, after, strict=True):
        if a != b:
            assert [a[f"{kind}_{side}"] for kind in ("label", "score") for side in (0, 1)] == [
                b[f"{kind}_{side}"] for kind in ("label", "score") for side in (1, 0)
            ]
        assert a["jpg_0"] == b["jpg_0"] and a["caption"] == b["caption"]


def test_chance_knows_pixels_and_prompts_alone() -> None:
    """Equal images of one prompt have one score, and the scores of others are spread evenly."""
    images = [Image.new("L", (2, 2), shade) for shade in range(200)]
    scores = chance(images, ["a dog"] * 200)
    assert scores == chance(images, ["a dog"] * 200) and len({*scores, *chance(images, ["a cat"] * 200)}) == 400
    assert all(0 <= score < 1 for score in scores) and abs(np.mean(scores) - 0.5) < 0.1


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of a right image, one with a wrong colour, and one with a wrong count, whose scores rise."""
    images = []
    for text in ("two red circles", "two blue circles", "a red circle"):
        prompt = scenes.parse(text)
        images.append(scenes.render(scenes.place_objects(prompt, np.random.default_rng(0))))
    file = tmp_path_factory.mktemp("lists") / "lists.parquet"
    texts, scores = ["two red circles"] * 3, [0.0, 1.0, 9.0]
    write_pairs(file, texts, images, scores, group=3, min_confidence=0.9, keep_all=True)
    return file


def test_pairs_of_a_list_are_its_best_and_worst_images(lists: Path, tmp_path: Path) -> None:
    assert write_best_and_worst(lists, tmp_path / "pairs.parquet") == 1
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    (source,) = pq.read_table(lists).to_pylist()
    assert (row["jpg_0"], row["jpg_1"]) == (source["image_path"][0], source["image_path"][2])
    assert (row["label_0"], row["label_1"], row["score_0"], row["score_1"]) == (0, 1, 0, 9)


def test_objectives_differ_in_one_part_and_score_another(lists: Path, tmp_path: Path) -> None:
    """Against a wrong count the right image gains a colour, and the image of a wrong colour none."""
    assert write_objectives(lists, tmp_path / "counts.parquet", "count", "colour", 4.0) == 2
    rows = pq.read_table(tmp_path / "counts.parquet").to_pylist()
    assert [(row["label_0"], row["label_1"]) for row in rows] == [(1, 0), (1, 0)]
    assert [(row["score_0"], row["score_1"]) for row in rows] == [(4, 0), (0, 0)]
    assert len(open_pairs("auto", str(tmp_path / "counts.parquet"))) == 2


def test_some_arms_keep_their_order(tmp_path: Path) -> None:
    study = STUDIES["flipped_labels"](tmp_path)
    assert list(select(study, ["lcpo", "dpo"]).arms) == ["dpo", "lcpo"]
    assert select(study, None) == study
    assert parse(["flipped_labels", "--arms", "dpo", "--output", "x"]).arms == ["dpo"]
    with pytest.raises(SystemExit):
        parse(["flipped_labels", "--arms", "kto", "--output", "x"])


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_arm_is_a_recipe(name: str, tmp_path: Path) -> None:
    study = STUDIES[name](tmp_path)
    for arm in study.arms.values():
        rates = [f"train.lr={study.rates[0]}"] if study.rates else []
        assert load_recipe(arm.recipe, [*arm.overrides, *rates]).evaluate is not None


def test_an_arm_without_rates_keeps_its_recipe_s(tmp_path: Path) -> None:
    assert search(select(STUDIES["online_images"](tmp_path), ["dgpo"]), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
