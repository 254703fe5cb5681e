"""Mistakes in a recipe, told in one sentence and with exit code 1 before any model is loaded."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmalign import cli
from mmalign.commands import preflight
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from tests.helpers.commands import Commands, Content, contains
from tests.helpers.logged import recorded_lines


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        # Keys and values.
        ("train.lrr=1e-5", "train has no 'lrr'; did you mean 'lr'?"),
        ("train.lr=fast", "train.lr: expected a number, got the text 'fast'"),
        ("method.name=difusion_dpo", "there is no method 'difusion_dpo'; did you mean 'diffusion_dpo'?"),
        ("train.lr", "'train.lr': expected section.key=value, such as train.lr=1e-5"),
        # Pairs.
        ("data.path=W/pair.parquet", "data.path: W/pair.parquet does not exist; expected *.parquet"),
        (
            "data.path=someone/pairs",
            "data.path: someone/pairs is not a local file and could not be loaded from the Hub",
        ),
        ("data.path=W/cut.parquet", "data.path: W/cut.parquet is not a readable Parquet file"),
        ("data.path=W/zero.parquet", "data.path: W/zero.parquet is not a readable Parquet file"),
        ("data.path=W/lacking.parquet", "W/lacking.parquet has no 'jpg_1' (found caption, jpg_0,"),
        ("data.columns={jpg_0: picture}", "has no 'picture' (found caption, jpg_0,"),
        ("data={format: folder, path: W/lines.jsonl}", "lines.jsonl has no 'rejected' (found prompt, chosen)"),
        ("data.path=W/empty.parquet", "data.path: W/empty.parquet has no rows; expected one a pair"),
        ("data.path=W/ties.parquet", "data.path: W/ties.parquet has no pair to learn from (8 ties, 0 rows dropped)"),
        ("data.cache=W/good.parquet", "data.cache: W/good.parquet is a file; choose a folder"),
        ("data={crop: random, fit: pad, path: W/good.parquet}", "data.crop: random has no meaning with data.fit: pad"),
        ("data={margin_scale: 2, path: W/good.parquet}", "margin_scale: 2.0 scales margins from scores"),
        ("data={resolution: 64x, path: W/good.parquet}", "data.resolution: expected pixels, such as 1024 or 1216x832"),
        ("data={resolution: 4, path: W/good.parquet}", "(width x height), got 4"),
        # Models.
        ("model.path=W/sd15", "model.path: there is no file or folder 'W/sd15'"),
        ("model.path=models/tiny_sdd", "did you mean 'models/tiny_sd'"),
        (
            "model.path=W/good.parquet",
            "model.path: W/good.parquet is a file; expected the folder of a diffusers pipeline",
        ),
        ("model.path=W/no_index", "model.path: W/no_index has no model_index.json; expected the folder of"),
        ("model.path=W/bad_index", "model.path: W/bad_index/model_index.json is not JSON"),
        ("model.path=W/list_index", "model.path: W/list_index/model_index.json holds a list and no dictionary"),
        ("model.path=W/cascade", "model.path: W/cascade is a StableCascadeCombinedPipeline; supported are Stable"),
        ("model.path=W/no_unet", "model.path: W/no_unet has no unet; copy it again"),
        ("model.path=W/no_tokenizer", "model.path: W/no_tokenizer has no tokenizer; copy it again"),
        (
            "model.path=someone/sd15",
            "model.path: someone/sd15 is not a local folder, and its model_index.json did not come ",
        ),
        ("model.vae=W/vae", "model.vae: there is no file or folder 'W/vae'"),
        # Everything else.
        (
            "train={sample_every: 5, samples: W/none.txt, steps: 1, lr: 1}",
            "train.samples: there is no file or folder 'W/none",
        ),
        ("train.trackers=[tensorbord]", "train.trackers: tensorbord is unknown; correct it, or leave it out"),
        ("output=W/good.parquet", "output: W/good.parquet is a file; choose a folder"),
        (
            "output=W/good.parquet/run",
            "output: W/good.parquet/run is not writable (Not a directory); choose",
        ),
    ],
)
def test_a_mistake_is_told_before_any_model_is_loaded(
    setting: str, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    message = mmalign.refused("train", content, setting.replace("W", str(world)))
    contains(message, sentence.replace("W", str(world)))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["instruct_engine", "sft"])
def test_margins_that_no_loss_reads_are_refused(name: str, mmalign: Commands, content: Content) -> None:
    message = mmalign.refused("train", {**content, "method": {"name": name}}, "data.margin=score")
    contains(message, f"data.margin: method.name: {name} reads no margins; leave score out")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("method", "model", "sentence"),
    [
        ({"name": "sft"}, {}, "method.reference: method.name: sft has no reference as configured; leave it out"),
        ({"name": "diffusion_dpo", "loss": "simpo"}, {}, "diffusion_dpo has no reference as configured"),
        (
            {"name": "diffusion_dpo", "num_cached_draws": 2},
            {},
            "leave method.num_cached_draws out, or use data.cache: off",
        ),
        (
            {"name": "diffusion_dpo"},
            {"tune": "lora", "adapter": {"path": "a", "use": "continue"}},
            "begins with the bare model as the reference; use model.adapter.use: merge",
        ),
    ],
)
def test_a_reference_that_cannot_move_is_refused(
    method: dict[str, Any], model: dict[str, Any], sentence: str, mmalign: Commands, content: Content
) -> None:
    changed = {**content, "model": {**content["model"], **model}, "method": {**method, "reference": {"mix": 1.0}}}
    contains(mmalign.refused("train", changed), sentence)


@pytest.mark.usefixtures("no_model")
def test_a_rate_of_an_annotator_whom_no_pair_has_is_refused(mmalign: Commands, content: Content) -> None:
    content = {**content, "method": {"name": "diffusion_dpo", "label_noise": {"annotators": {"Kim": 0.2}}}}
    sentence = "has the annotator Kim (found nothing); correct the name"
    contains(mmalign.refused("train", content), sentence)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(load_recipe(content), dry_run=True)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("evaluate.prompts=0", "evaluate.prompts: expected at least 1, or a file with one prompt a line, got 0"),
        ("evaluate.sampling.resolution=20", "evaluate.sampling.resolution: expected multiples of 8 pixels, got 20"),
        (
            "evaluate.sampling.resolution=64x20",
            "evaluate.sampling.resolution: expected multiples of 8 pixels, got 64x20",
        ),
        ("evaluate.prompts=no-such.txt", "evaluate.prompts: there is no file or folder 'no-such.txt'"),
    ],
)
def test_wrong_evaluation_is_refused_by_evaluate_alone(
    setting: str, sentence: str, mmalign: Commands, content: Content
) -> None:
    """Training says it beforehand, and goes on."""
    reward = {"path": "models/tiny_clip"}
    content = {**content, "evaluate": {**content["evaluate"], "benchmark": "preference", "reward": reward}}
    contains(mmalign.refused("evaluate", content, setting), sentence)
    with recorded_lines() as lines:
        preflight.check(load_recipe(content, [setting]), "training")
    assert [line for line in lines if line.startswith(f"warning: `mmalign evaluate` cannot run yet: {sentence}")]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("tracker", ["wandb", "aim", "mlflow"])
def test_missing_tracker_is_refused(tracker: str, mmalign: Commands, content: Content) -> None:
    from accelerate.tracking import get_available_trackers

    if tracker in [str(t) for t in get_available_trackers()]:
        pytest.skip(f"{tracker} is installed")
    contains(mmalign.refused("train", content, f"train.trackers=[{tracker}]"), f"train.trackers: {tracker} is not inst")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("quickstrat", "did you mean 'configs/text_to_image/quickstart.yaml'"),
        ("configs/text_to_image/quickstrat.yaml", "did you mean 'configs/text_to_image/quickstart.yaml'"),
        ("/nowhere/recipe.yaml", "there is no file or folder '/nowhere/recipe.yaml'"),
        ("configs", "cannot be read (Is a directory); expected a recipe, a short file in YAML"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, sentence: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", name])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    contains(result.stderr, "error: ", sentence)


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    message = mmalign.refused("train", content, f"output={tmp_path / 'locked' / 'out'}")
    contains(message, "output: ", "is not writable (Permission denied); choose")
