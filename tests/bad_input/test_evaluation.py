"""What evaluate, gallery and prepare need is told before it costs anything."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import EVALUATE, JUDGED, UNET, Commands, Content, contains, damage


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "evaluate", "sentence"),
    [
        ("evaluate", EVALUATE, "there is no trained model; run `mmalign train` with this recipe first"),
        ("gallery", EVALUATE, "there is no trained model; run `mmalign train` with this recipe first"),
        ("evaluate", None, "evaluate: the recipe has no such section; add one, for example"),
        ("gallery", None, "evaluate: the recipe has no such section"),
        ("gallery", {"benchmark": "implicit"}, "evaluate: benchmark implicit generates no images"),
        (
            "evaluate",
            {"benchmark": "implicit"},
            "evaluate: implicit needs a validation split; set data.validation_fraction",
        ),
        (
            "evaluate",
            {"benchmark": "preference"},
            "benchmark preference needs a reward model; add evaluate.reward.path",
        ),
        ("evaluate", {**JUDGED, "prompts": "W/none.txt"}, "evaluate.prompts: there is no file or folder 'W/none.txt'"),
        (
            "evaluate",
            {**JUDGED, "prompts": "W/comments.txt"},
            "evaluate.prompts: W/comments.txt has none; expected one",
        ),
        ("evaluate", {**JUDGED, "prompts": "W/latin.txt"}, "evaluate.prompts: W/latin.txt cannot be read"),
        ("evaluate", {**JUDGED, "prompts": "W"}, "evaluate.prompts: W cannot be read ("),
        ("evaluate", {**JUDGED, "reward": {"path": "models/tiny_klip"}}, "evaluate.reward.path: there is no file"),
        (
            "evaluate",
            {**JUDGED, "reward": {"path": "W/x", "name": "open_klip"}},
            "there is no 'open_klip'; did you mean 'open_clip'?",
        ),
        ("prepare", EVALUATE, "prepare: the recipe has no such section; add one: configs"),
    ],
)
def test_evaluation_refuses_early_before_loading_a_model(
    command: str, evaluate: Content | None, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    filled = json.loads(json.dumps(evaluate).replace("W", str(world)))
    message = mmalign.refused(command, {**content, "evaluate": filled})
    contains(message, sentence.replace("W", str(world)))
    assert not Path(content["output"]).exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("prepare.reward.path=models/tiny_klip", "prepare.reward.path: there is no file or folder 'models/tiny_klip'"),
        ("prepare.prompts=W/comments.txt", "prepare.prompts: W/comments.txt has none"),
        (
            "prepare={prompt_pairs: true, prompts: W/everyday.txt, reward: {path: models/tiny_clip}}",
            "prepare.prompts: W/everyday.txt has the line 'a fox'; expected two prompts with a tab between them",
        ),
        ("data.path=W", "data.path: W is a folder; expected the name of the parquet file that prepare writes"),
        ("data.path=W/good.parquet/x.parquet", "data.path: W/good.parquet is not writable (File exists)"),
    ],
)
def test_what_prepare_needs_is_told_before_any_model_is_loaded(
    setting: str, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    section = {"reward": {"path": "models/tiny_clip"}, "prompts": 2}
    message = mmalign.refused("prepare", {**content, "prepare": section}, setting.replace("W", str(world)))
    contains(message, sentence.replace("W", str(world)))


@pytest.mark.slow
def test_unloadable_reward_is_refused_before_generation(
    mmalign: Commands, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmalign("train", content)
    monkeypatch.setattr(
        "mmalign.modalities.text_to_image.evaluate.generate_both", lambda *_: pytest.fail("pictures were drawn")
    )
    judge = tmp_path / "judge"
    from mmalign.resources import resolve

    shutil.copytree(resolve("models/tiny_clip"), judge)
    damage(judge, "open_clip_model.safetensors", keep=1000)
    message = mmalign.refused("evaluate", {**content, "evaluate": {**JUDGED, "reward": {"path": str(judge)}}})
    contains(message, "judge", str(judge))
    options = {"path": "models/tiny_clip", "options": {"batchsize": 2}}
    message = mmalign.refused("evaluate", {**content, "evaluate": {**JUDGED, "reward": options}})
    contains(message, "reward open_clip: batchsize: ", "options: batch_size, pretrained")


@pytest.mark.slow
def test_a_damaged_trained_model(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    damage(tmp_path / "out" / "model", UNET, keep=1000)
    message = mmalign.refused("evaluate", content)
    contains(message, f"{tmp_path / 'out' / 'model'} could not be loaded", "`mmalign train` writes it again")
    mmalign("train", content)
    assert "prompts fulfilled" in mmalign("evaluate", content)
