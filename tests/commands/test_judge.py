"""A judge of images from its recipe to its use by other recipes."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.config.methods.judges import BradleyTerryConfig
from mmalign.methods import requirements_of
from mmalign.modalities import modality_of
from mmalign.rewards import load_reward_model
from tests.helpers import data_files, first_fast, recipes
from tests.helpers.runs import assert_resumes


def judge_recipe(clip: Path, folder: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe of the folder's pairs, or of eight pairs in which white upper halves are preferred."""
    pairs = folder / "pairs.parquet"
    pairs = pairs if pairs.exists() else data_files.pick_a_pic(pairs)
    content = recipes.diffusion(clip, pairs, folder / "out", **{"method": {"name": "bradley_terry"}, **sections})
    content["data"].pop("resolution")
    return content


PARTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tune": "lora", "lora": {"rank": 2}},
    "head": {"head": "linear"},
    "random": {"weights": "random"},
    "attributes": {"attributes": {"upper": [0, 5]}},
    "attributes by lora": {"attributes": {"upper": [0, 5]}, "tune": "lora", "lora": {"rank": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", first_fast(list(PARTS)))
def test_a_judge_resumes_bit_by_bit_and_judges(part: str, tiny_clip: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "save_every": 1}
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    pq.write_table(pq.read_table(pairs).append_column("upper", pa.array([[0.0, 5.0]] * 8)), pairs)
    content = judge_recipe(tiny_clip, tmp_path, model={"tune": "full", **PARTS[part]}, train=train)
    assert_resumes(content)
    images = [Image.open(io.BytesIO(data_files.png(seed))) for seed in (1, 2)]
    before, after = (
        load_reward_model("open_clip", str(path))(images, ["thing number 1"] * 2)
        for path in (tiny_clip, tmp_path / "out" / "model")
    )
    assert ((before - after).abs() > 1e-4).all()


@pytest.mark.slow
def test_a_judge_learns_is_audited_and_labels_pairs(tiny_clip: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    """It tells held-out white halves apart, and `prepare` of another recipe takes it as its judge."""
    table = pq.read_table(data_files.pick_a_pic(tmp_path / "pairs.parquet", 48))
    names = pa.array(["ann", "ben", "ben"] * 16)
    pq.write_table(table.append_column("annotator", names), tmp_path / "pairs.parquet")
    content = judge_recipe(
        tiny_clip,
        tmp_path,
        train={"steps": 40, "batch_size": 8, "lr": 2e-3, "save_every": 40},
        data={"validation_fraction": 0.4},
        evaluate={"benchmark": "judge", "reward": {"path": str(tiny_clip)}, "bins": 5},
    )
    recipe = load_recipe(content)
    assert mmalign.train(recipe).verdict.startswith("the judge learned the labels")
    evaluation = mmalign.evaluate(recipe)
    assert evaluation.result == json.loads((evaluation.folder / "result.json").read_text())
    before, after = (evaluation.result[side]["measures"]["accuracy"] for side in ("before", "after"))
    assert after["low"] > 0.5 and after["estimate"] > before["estimate"]
    assert set(evaluation.result["agreement"]) == {"after, labels", "after, other", "other, labels"}
    assert "file size" in evaluation.result["properties"]
    assert {"accuracy, annotator ann", "accuracy, annotator ben"} <= set(evaluation.result["difference"])
    # The other judge is the one before training
    at_first = evaluation.result["agreement"]["other, labels"]["equal"]["estimate"]
    assert at_first == pytest.approx(before["estimate"])
    reward = {"path": str(tmp_path / "out" / "model")}
    exported = mmalign.export(recipe, to="merged", dtype="bfloat16")
    assert "library_name: open_clip" in (exported / "README.md").read_text()
    sampling = {"steps": 1, "guidance": 1.0, "resolution": data_files.SIDE}
    prepare = {"prompts": 2, "images_per_prompt": 2, "min_confidence": 0.5, "reward": reward, "sampling": sampling}
    made = recipes.diffusion(tiny_sd15, tmp_path / "made.parquet", tmp_path / "aligned", prepare=prepare)
    assert pq.read_table(mmalign.prepare(load_recipe(made))).num_rows == 2


@pytest.mark.parametrize("rows", ["pairs", "lists"])
def test_rankings_ties_and_labels_are_learned(rows: str, tiny_clip: Path, tmp_path: Path) -> None:
    table = [
        {"prompt": f"p {n}", "image_path": [data_files.png(10 * n + k) for k in range(3)], "rank": [2, 1, 3]}
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    method, data = {"name": "bradley_terry", "rows": rows}, {"limit": 4}
    trained = mmalign.train(load_recipe(judge_recipe(tiny_clip, tmp_path, method=method, data=data)))
    assert trained.steps == 4 and "the judge" in trained.verdict


REFUSED = {
    "resolution": (["data.resolution=64"], r"data\.resolution: means nothing here: a judge's own preprocessing"),
    "fit": (["data.flip=true", "data.fit=pad"], r"data\.fit: means nothing here: .* leave fit and flip out"),
    "source": (["data.columns={source: old}"], r"data\.columns: source: a judge of images sees no source images"),
    "compile": (["train.compile=true"], r"train\.compile: not supported for judges of images"),
    "samples": (["train.sample_every=1"], r"train\.sample_every: method\.name: bradley_terry generates nothing"),
    "head": (["model.head=linear", "model.tune=lora"], r"head: linear trains the last layers of pretrained towers"),
    "random": (["model.head=linear", "model.weights=random"], r"head: linear trains the last layers of pretrained"),
    "quantize": (["model.quantize=nf4", "model.tune=lora"], r"quantize: 'nf4' does not apply to a judge of images"),
    "seed": (["evaluate={benchmark: judge, seed: 1}"], r"seed: 1 means nothing here: an audit draws no random numbers"),
    "path": (["model.path=models/none"], r"model\.path: there is no file or folder 'models/none'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_meaning_are_refused(case: str, tiny_clip: Path, tmp_path: Path) -> None:
    settings, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        mmalign.train(load_recipe(judge_recipe(tiny_clip, tmp_path), settings))


@pytest.mark.slow
def test_attributes_are_learned_audited_and_judge(tiny_clip: Path, tmp_path: Path) -> None:
    """Ratings say whether the upper half is white, in the row's order; some are missing."""
    table = pq.read_table(data_files.pick_a_pic(tmp_path / "pairs.parquet", 48))
    ratings = [[0.0, 5.0] if row % 2 == 0 else [5.0, None] for row in range(48)]
    pq.write_table(table.append_column("upper", pa.array(ratings)), tmp_path / "pairs.parquet")
    content = judge_recipe(
        tiny_clip,
        tmp_path,
        model={"tune": "full", "attributes": {"upper": [0, 5]}},
        train={"steps": 40, "batch_size": 8, "lr": 2e-3, "save_every": 40},
        data={"validation_fraction": 0.4},
        evaluate={"benchmark": "judge"},
    )
    recipe = load_recipe(content)
    mmalign.train(recipe)
    evaluation = mmalign.evaluate(recipe)
    audit = evaluation.result["attributes"]["upper"]
    assert audit["error"]["estimate"] < audit["spread"] / 2 and audit["correlation"]["low"] > 0.5
    judge = load_reward_model("open_clip", str(tmp_path / "out" / "model"), attribute="upper")
    upper, lower = (Image.open(io.BytesIO(data_files.png(900, upper=half))) for half in (True, False))
    high, low = judge([upper, lower], ["thing number 900"] * 2).tolist()
    assert high > 3.5 and low < 1.5


def test_ratings_that_do_not_fit_are_dropped_or_refused(tiny_clip: Path, tmp_path: Path) -> None:
    table = pq.read_table(data_files.pick_a_pic(tmp_path / "pairs.parquet", 4))
    ratings = [[0.0, 5.0], [9.0, 1.0], [1.0], None]
    pq.write_table(table.append_column("upper", pa.array(ratings)), tmp_path / "pairs.parquet")
    content = judge_recipe(tiny_clip, tmp_path, model={"tune": "full", "attributes": {"upper": [0, 5]}})
    train, _ = modality_of(load_recipe(content)).open_pairs(load_recipe(content), requirements_of(BradleyTerryConfig()))
    assert train[0].attributes == ((5.0,), (0.0,)), "the preferred image comes first"
    assert [row.reason for row in train.skipped] == [
        "upper has the rating 9; expected numbers from 0 to 5",
        "upper has 1 ratings; expected one for each of 2 images",
        "upper is null; expected a list",
    ]
    content["model"]["attributes"] = {"lower": [0, 5]}
    with pytest.raises(ValueError, match="has no 'lower'"):
        mmalign.train(load_recipe(content))
    with pytest.raises(ValueError, match="expected the lowest rating, then the highest"):
        load_recipe(judge_recipe(tiny_clip, tmp_path, model={"attributes": {"upper": [5, 5]}}))
