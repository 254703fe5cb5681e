"""People that are added to a trained judge: `model.tune: annotators`."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mmalign
from mmalign.commands.load_recipe import load_recipe
from mmalign.families import image_judge
from mmalign.rewards import load_reward_model
from mmalign.rewards._annotators import load_mixture
from tests.commands.test_judge import judge_recipe
from tests.helpers import data_files
from tests.helpers.loading import CPU
from tests.helpers.runs import assert_resumes, assert_same, train_weights

OLD = ["ann", "ben", None]  # None has the mean taste


@pytest.fixture
def judge(tiny_clip: Path, tmp_path: Path) -> Path:
    """A judge with the attribute `upper` and with ann and ben, whose prototypes are opposite and who differ."""
    family = image_judge.load(str(tiny_clip), CPU, attributes={"upper": (0.0, 5.0)})
    family.add_annotators(["ann", "ben"], prototypes=2, form="angle", seed=0)
    mixture, heads = family.network.annotators, family.network.attributes
    assert mixture is not None and mixture.maps is not None and heads is not None
    with torch.no_grad():
        mixture.points[0].normal_(generator=torch.Generator().manual_seed(1))
        mixture.points[1] = -mixture.points[0]
        heads.weight.normal_(generator=torch.Generator().manual_seed(2))
    family.save(tmp_path / "judge", family.network)
    return tmp_path / "judge"


def write_pairs(path: Path, names: list[str | None], taste: str = "upper") -> Path:
    """Write a pair of each name, all of one taste, in a column `annotator`."""
    table = pq.read_table(data_files.pick_a_pic(path, len(names))).to_pylist()
    for row, name in zip(table, names, strict=True):
        row["annotator"] = name
        if taste == "lower":
            row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def added(judge: Path, folder: Path, /, **sections: Any) -> dict[str, Any]:
    model = {"tune": "annotators", **sections.pop("model", {})}
    train = {"steps": 2, "save_every": 1, "lr": 1e-3, **sections.pop("train", {})}
    return judge_recipe(judge, folder, model=model, train=train, **sections)


def score(judge: Path, name: str | None) -> Tensor:
    images = [Image.open(io.BytesIO(data_files.png(seed, upper=seed % 2 == 0))) for seed in range(4)]
    return load_reward_model("open_clip", str(judge), annotator=name)(images, ["thing number 1"] * 4)


@pytest.mark.slow
def test_a_new_annotator_changes_nothing_else(judge: Path, tmp_path: Path) -> None:
    """The run resumes bit by bit, trains the shares alone, and all old scores stay the same to the last bit."""
    write_pairs(tmp_path / "pairs.parquet", ["eve"] * 8)
    weights, model = assert_resumes(added(judge, tmp_path)), tmp_path / "out" / "model"
    assert {name: x.shape for name, x in weights.items()} == {"annotators.added": (1, 2)}
    for name in ("open_clip_model.safetensors", "attributes.safetensors"):
        assert_same(load_file(judge / name), load_file(model / name))
    before, after = (load_file(folder / "annotators.safetensors") for folder in (judge, model))
    assert torch.equal(after["weights"], torch.cat([before["weights"], weights["annotators.added"]]))
    assert_same({**before, "weights": after["weights"]}, after)
    for name in OLD:
        assert torch.equal(score(judge, name), score(model, name))
    assert not (score(model, "eve") == score(model, None)).any()
    # Another one beside her
    write_pairs(tmp_path / "pairs.parquet", ["fay"] * 4)
    train_weights(added(model, tmp_path), f"output={tmp_path / 'next'}")
    for name in (*OLD, "eve"):
        assert torch.equal(score(model, name), score(tmp_path / "next" / "model", name))
    mixture = load_mixture(str(tmp_path / "next" / "model"))
    assert mixture is not None and (mixture.names, mixture.num_original) == (("ann", "ben", "eve", "fay"), 2)


@pytest.mark.slow
def test_pairs_of_others_teach_nothing_and_are_left_out(judge: Path, tmp_path: Path) -> None:
    """A table that grew gives the same shares as the new annotator's rows alone."""
    settings = {"train": {"batch_size": 8}}
    write_pairs(tmp_path / "pairs.parquet", ["eve"] * 3)
    alone = train_weights(added(judge, tmp_path, **settings))
    write_pairs(tmp_path / "pairs.parquet", ["eve"] * 3 + ["ann", None, "fay", "ben", "eve"])
    overrides = ["model.annotators={names: [eve]}", "data.limit=3", f"output={tmp_path / 'grown'}"]
    grown = train_weights(added(judge, tmp_path, **settings), *overrides)
    torch.testing.assert_close(grown["annotators.added"], alone["annotators.added"])
    assert not torch.equal(grown["annotators.added"][0, 0], grown["annotators.added"][0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("taste", ["upper", "lower"])
def test_few_pairs_tell_a_taste(judge: Path, tmp_path: Path, taste: str) -> None:
    """The prototypes are opposite, so that one of them orders eve's pairs better than the mean does."""
    write_pairs(tmp_path / "pairs.parquet", ["eve"] * 16, taste)
    settings: dict[str, Any] = {"train": {"steps": 60, "batch_size": 8, "lr": 5e-3, "save_every": 60}}
    settings |= {"data": {"validation_fraction": 0.5}, "evaluate": {"benchmark": "judge"}}
    recipe = load_recipe(added(judge, tmp_path, **settings))
    mmalign.train(recipe)
    results = [mmalign.evaluate(recipe, checkpoint=which).result for which in (None, 60)]
    for side in ("before", "after"):  # the judge before is the old one with the mean taste
        first, second = (result[side]["measures"]["log loss"]["estimate"] for result in results)
        assert first == pytest.approx(second, rel=1e-5)
    about = results[0]["annotators"]
    assert list(about["shares"]) == ["ann", "ben", "eve"] and about["all annotators"]["annotators"] == 1
    losses = [results[0][side]["measures"]["log loss"]["estimate"] for side in ("before", "after")]
    assert losses[1] < losses[0]
    # The folder's recipe names her, and says the same again
    recorded = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert recorded.model_dump()["model"]["annotators"] == {"prototypes": 2, "form": "angle", "names": ["eve"]}
    assert mmalign.train(recorded).steps == 60


REFUSED = {
    "known": ([], ["ann", "ben"], r"has pairs of ann, ben, whom .*judge knows already; give pairs of somebody new"),
    "unnamed": ([], [None, None], r"model\.tune: annotators: no pair of .* has a name in the column 'annotator'"),
    "old name": (["model.annotators={names: [ann]}"], ["ann", "eve"], r"names: .* has the annotator ann already"),
    "missing": (["model.annotators={names: [fay]}"], ["eve"], r"has the annotator fay \(found eve\)"),
    "prototypes": (["model.annotators={prototypes: 3}"], ["eve"], r"prototypes: got 3; .* has 2, which tune: ann"),
    "form": (["model.annotators={form: distance}"], ["eve"], r"form: got distance; .* has angle.*; leave it out"),
    "head": (["model.head=linear"], ["eve"], r"head: tune: annotators keeps all that the judge has.*; leave head out"),
    "random": (["model.weights=random"], ["eve"], r"weights: tune: annotators .*; leave weights out"),
    "attributes": (["model.attributes={upper: [0, 5]}"], ["eve"], r"attributes: tune: annotators .*; leave attributes"),
    "lists": (["method.rows=lists"], ["eve"], r"model\.tune: annotators: lists have no annotators; use method\.rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_additions_that_cannot_be_are_refused(case: str, judge: Path, tmp_path: Path) -> None:
    settings, names, sentence = REFUSED[case]
    write_pairs(tmp_path / "pairs.parquet", [*names, *names])
    with pytest.raises(ValueError, match=sentence):
        mmalign.train(load_recipe(added(judge, tmp_path), settings), dry_run=True)


def test_a_judge_without_annotators_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", ["eve", "eve"])
    sentence = r"model\.tune: annotators: the judge .* has no annotators to add any to; name the folder of a judge"
    with pytest.raises(ValueError, match=sentence):
        mmalign.train(load_recipe(added(tiny_clip, tmp_path)), dry_run=True)


def test_a_judge_of_one_prototype_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    family = image_judge.load(str(tiny_clip), CPU)
    family.add_annotators(["ann"], prototypes=1, form="angle", seed=0)
    family.save(tmp_path / "judge", family.network)
    write_pairs(tmp_path / "pairs.parquet", ["eve", "eve"])
    with pytest.raises(ValueError, match=r"has one prototype, which everybody shares; .*prototypes: 2 first"):
        mmalign.train(load_recipe(added(tmp_path / "judge", tmp_path)), dry_run=True)


@pytest.mark.parametrize("model", ["models/tiny_sd", "models/tiny_llava"])
def test_other_models_have_no_annotators_to_tune(model: str) -> None:
    method, modality = {"models/tiny_sd": "diffusion_dpo", "models/tiny_llava": "dpo"}[model], {"path": "x.parquet"}
    content = {"method": {"name": method}, "model": {"path": model, "tune": "annotators"}, "data": modality}
    with pytest.raises(ValueError, match=r"model\.tune: .*'lora' or 'full'"):
        load_recipe({**content, "train": {"steps": 1, "lr": 1e-3}, "output": "runs/x"})
