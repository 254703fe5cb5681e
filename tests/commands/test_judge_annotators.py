"""A judge that learns its annotators' tastes, from its recipe to its use by other recipes."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.families import image_judge
from mmalign.rewards import load_reward_model
from tests.commands.test_judge import judge_recipe
from tests.helpers import data_files, first_fast, recipes
from tests.helpers.loading import CPU
from tests.helpers.runs import assert_resumes

NAMES = ["ann", "ben", "cem", "dan"]
UPPER = NAMES[:2]  # they prefer white upper halves, the others lower ones


def two_tastes(folder: Path, number: int = 8) -> Path:
    """Write pairs of four annotators, of whom two have the opposite taste of the others."""
    table = pq.read_table(data_files.pick_a_pic(folder / "pairs.parquet", number)).to_pylist()
    for n, row in enumerate(table):
        row["annotator"] = NAMES[n // 2 % 4]
        if row["annotator"] not in UPPER:
            row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
    pq.write_table(pa.Table.from_pylist(table), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def tasteful(clip: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    model = {"tune": "full", "annotators": {"prototypes": 2}, **sections.pop("model", {})}
    return judge_recipe(clip, folder, model=model, **sections)


PARTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tune": "lora", "lora": {"rank": 2}},
    "head": {"head": "linear"},
    "distance": {"annotators": {"prototypes": 3, "form": "distance"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", first_fast(list(PARTS)))
def test_a_mixture_resumes_bit_by_bit_and_judges(part: str, tiny_clip: Path, tmp_path: Path) -> None:
    two_tastes(tmp_path)
    content = tasteful(tiny_clip, tmp_path, model=PARTS[part], train={"steps": 2, "save_every": 1})
    weights = assert_resumes(content)
    assert weights["annotators.weights"].shape[0] == 4
    images = [Image.open(io.BytesIO(data_files.png(seed))) for seed in (1, 2)]
    scores = [
        load_reward_model("open_clip", str(tmp_path / "out" / "model"), annotator=name)(images, ["thing number 1"] * 2)
        for name in (None, "ann", "ben")
    ]
    assert not (scores[0] == scores[1]).any() and not (scores[1] == scores[2]).any()


@pytest.mark.slow
def test_a_checkpoint_with_adapters_is_audited(tiny_clip: Path, tmp_path: Path) -> None:
    """The judge before training is the CLIP alone, and adapters off would not take the mixture off."""
    two_tastes(tmp_path, 16)
    model = {"tune": "lora", "lora": {"rank": 2}, "attributes": {}}
    sections: dict[str, Any] = {"train": {"steps": 2, "save_every": 1}, "data": {"validation_fraction": 0.5}}
    recipe = load_recipe(tasteful(tiny_clip, tmp_path, model=model, evaluate={"benchmark": "judge"}, **sections))
    mmalign.train(recipe)
    results = [mmalign.evaluate(recipe, checkpoint=which).result for which in (None, 2)]
    assert results[0]["annotators"]["shares"] == results[1]["annotators"]["shares"]
    for side in ("before", "after"):  # adapters are within the weights of one of them
        first, second = (result[side]["measures"]["log loss"]["estimate"] for result in results)
        assert first == pytest.approx(second, rel=1e-5)


REFUSED = {
    "lists": (["method.rows=lists"], r"model\.annotators: lists have no annotators; use method\.rows: pairs"),
    "name": (
        ["model.annotators.names=[ann, eve]"],
        r"no pair of .* has the annotator eve \(found ann, ben, cem, dan\)",
    ),
    "prototypes": (["model.annotators.prototypes=0"], r"model\.annotators\.prototypes: .* greater than or equal to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mixtures_that_cannot_be_are_refused(case: str, tiny_clip: Path, tmp_path: Path) -> None:
    two_tastes(tmp_path)
    settings, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        mmalign.train(load_recipe(tasteful(tiny_clip, tmp_path), settings))


def test_data_without_annotators_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    pq.write_table(pq.read_table(pairs).append_column("user", pa.array(["ann"] * 8)), pairs)
    sentence = r"model\.annotators: no pair of .* has a name in the column 'annotator'; nothing reads .*user; map"
    with pytest.raises(ValueError, match=sentence):
        mmalign.train(load_recipe(tasteful(tiny_clip, tmp_path)))
    mmalign.train(load_recipe(tasteful(tiny_clip, tmp_path), ["data.columns={annotator: user}"]), dry_run=True)


def test_an_annotator_that_a_judge_does_not_know_is_named(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'eve' \(it has none\); name one of its annotators"):
        load_reward_model("open_clip", str(tiny_clip), annotator="eve")
    family = image_judge.load(str(tiny_clip), CPU, attributes={"upper": (0.0, 5.0)})
    family.add_annotators([str(n) for n in range(12)], prototypes=2, form="angle", seed=0)
    family.save(tmp_path / "judge", family.network)
    with pytest.raises(ValueError, match=r"has no 'eve' \(it has 0, 1, .*, 9 and 2 more\)"):
        load_reward_model("open_clip", str(tmp_path / "judge"), annotator="eve")
    with pytest.raises(ValueError, match="an attribute is the same for all; leave one of them out"):
        load_reward_model("open_clip", str(tmp_path / "judge"), annotator=7, attribute="upper")
    load_reward_model("open_clip", str(tmp_path / "judge"), annotator=7)


@pytest.mark.slow
def test_opposite_tastes_are_told_apart(tiny_clip: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    """The plain judge is right in half of the held-out pairs, a mixture of two prototypes in most."""
    two_tastes(tmp_path, 64)
    settings: dict[str, Any] = {
        "train": {"steps": 60, "batch_size": 16, "lr": 2e-3, "save_every": 30},
        "data": {"validation_fraction": 0.4},
        "evaluate": {"benchmark": "judge"},
    }
    plain = load_recipe({**judge_recipe(tiny_clip, tmp_path, **settings), "output": str(tmp_path / "plain")})
    recipe = load_recipe(tasteful(tiny_clip, tmp_path, **settings))
    accuracies = []
    for each in (plain, recipe):
        mmalign.train(each)
        evaluation = mmalign.evaluate(each)
        accuracies.append(evaluation.result["after"]["measures"]["accuracy"]["estimate"])
    assert accuracies[0] < 0.6 and accuracies[1] > 0.8
    about = evaluation.result["annotators"]
    assert about["all annotators"]["mean"]["estimate"] < 0.6 < 0.8 < about["all annotators"]["own"]["estimate"]
    largest = [max(range(2), key=about["shares"][name].__getitem__) for name in NAMES]
    assert largest[0] == largest[1] != largest[2] == largest[3]
    # Each one's judge, in the hands of another recipe
    model = str(tmp_path / "out" / "model")
    upper, lower = (Image.open(io.BytesIO(data_files.png(900, upper=half))) for half in (True, False))
    for name in NAMES:
        high, low = load_reward_model("open_clip", model, annotator=name)([upper, lower], ["thing number 900"] * 2)
        assert (high > low) == (name in UPPER)
    sampling = {"steps": 1, "guidance": 1.0, "resolution": data_files.SIDE}
    reward = {"path": model, "options": {"annotator": "cem"}}
    prepare = {"prompts": 2, "images_per_prompt": 2, "min_confidence": 0.5, "reward": reward, "sampling": sampling}
    made = recipes.diffusion(tiny_sd15, tmp_path / "made.parquet", tmp_path / "aligned", prepare=prepare)
    assert pq.read_table(mmalign.prepare(load_recipe(made))).num_rows == 2
