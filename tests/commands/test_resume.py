"""Resuming of a run: other data and geometry are refused, changed options are used and recorded."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.commands.evaluate import evaluate
from mmalign.commands.gallery import gallery
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.training import checkpoint
from mmalign.training.export import read_run_info
from tests.helpers import data_files, recipes
from tests.helpers.runs import assert_resumes, assert_same, train_weights

Content = dict[str, Any]


@pytest.fixture
def content(tiny_sd15: Path, tmp_path: Path) -> Content:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    return recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"log_every": 3})


@pytest.fixture(scope="module")
def trained(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Return the recipe of a run of two updates, for commands that are refused and leave it as it is."""
    content = recipes.diffusion_in(tiny_sd15, tmp_path_factory.mktemp("trained"))
    train(load_recipe(content, ["train.steps=2"]))
    return content


@pytest.mark.slow
def test_balanced_thumbs_are_of_one_run_and_never_fresh(content: Content) -> None:
    """Rows recur within their first epoch, so no update shows what holds for other rows."""
    content["method"] = {"name": "diffusion_kto", "liked_share": 0.5}
    content["data"]["cut_pairs"] = True
    train(load_recipe(content, ["train.steps=1"]))
    (path,) = checkpoint.complete(Path(content["output"]))
    saved = json.loads((path / "checkpoint.json").read_text())["identity"]
    assert saved["liked_share"] == "0.5" and checkpoint.read(path, saved).state["reports"]["fresh"] == []
    for share, now in (("0.8", "0.8"), ("null", "none")):
        with pytest.raises(ValueError, match=f"another run .liked_share 0.5; this one has liked_share {now}"):
            train(load_recipe(content, [f"method.liked_share={share}"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.limit=6", "data.limit None"),
        ("data.validation_fraction=0.5", "data.validation_fraction 0.0"),
        ("data.resolution=32", "data.resolution"),
        ("data.flip=true", "data.flip False"),
        ("train.seed=1", "seed 0"),
        ("train.batch_size=4", "pairs of a batch 2"),
        ("train.gradient_accumulation_steps=2", "batches of an update 1"),
        ("train.precision=bfloat16", "precision float32"),
        ("train.optimizer=adafactor", "optimizer adamw"),
        ("method.name=sft", "method diffusion_dpo"),
    ],
)
def test_resume_refuses_another_run_by_name(override: str, named: str, trained: Content) -> None:
    with pytest.raises(ValueError, match="belongs to another run") as raised:
        train(load_recipe(trained, [override]))
    assert named in str(raised.value)


def other_schedule(model: Path) -> None:
    """Say another prediction type than before, as somebody who finds the old one wrong."""
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))


def other_weight(file: Path) -> None:
    weights = load_file(file)
    weights[min(weights)] = weights[min(weights)] + 0.5
    save_file(weights, file, {"format": "pt"})


@pytest.mark.slow
def test_other_parts_of_the_base_model_are_named(
    tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The denoiser is the same, and learns from other latents, texts or targets."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd15, model)
    content = recipes.diffusion_in(model, tmp_path / "run", data={"validation_fraction": 0.25})
    content["evaluate"] = {"benchmark": "implicit"}
    train(load_recipe(content, ["train.steps=1"]))
    changes: dict[str, Callable[[], None]] = {
        "noise schedule": partial(other_schedule, model),
        "text encoder": partial(other_weight, model / "text_encoder" / "model.safetensors"),
        "vae": partial(other_weight, model / "vae" / "diffusion_pytorch_model.safetensors"),
    }
    for name, change in changes.items():
        shutil.rmtree(model)
        shutil.copytree(tiny_sd15, model)
        evaluate(load_recipe(content))
        assert "other than in the training" not in caplog.text
        change()
        with pytest.raises(ValueError, match=rf"belongs to another run \({name} \w+; this one has {name} \w+\)"):
            train(load_recipe(content, ["train.steps=2"]))
        evaluate(load_recipe(content))
        assert f"model.path: {model} has {name} other than in the training" in caplog.text
        caplog.clear()


def swap_labels(rows: list[Content]) -> None:
    for row in rows:
        row["label_0"], row["label_1"] = row["label_1"], row["label_0"]


def drop_rows(rows: list[Content]) -> None:
    del rows[5:]


def change_an_image(rows: list[Content]) -> None:
    rows[3]["jpg_1"] = data_files.png(99)


def change_a_prompt(rows: list[Content]) -> None:
    rows[3]["caption"] = "another"


@pytest.mark.slow
@pytest.mark.parametrize("change", [swap_labels, drop_rows, change_an_image, change_a_prompt])
def test_resume_refuses_changed_pairs(change: Any, trained: Content, tmp_path: Path) -> None:
    rows = pq.read_table(trained["data"]["path"]).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "changed.parquet")
    with pytest.raises(ValueError, match=r"belongs to another run .*pairs "):
        train(load_recipe(trained, [f"data.path={tmp_path}/changed.parquet"]))


@pytest.mark.slow
def test_pairs_may_move_to_another_file(content: Content, tmp_path: Path) -> None:
    whole = train_weights({**content, "output": str(tmp_path / "whole")})
    train(load_recipe(content, ["train.steps=2"]))
    moved = Path(content["data"]["path"]).rename(tmp_path / "moved.parquet")
    assert_same(train_weights(content, f"data.path={moved}"), whole)


@pytest.mark.slow
def test_changed_options_are_used_and_recorded(content: Content, tmp_path: Path, log_lines: list[str]) -> None:
    content["evaluate"] = {"benchmark": "scenes", "prompts": 2, "sampling": {"steps": 1, "resolution": 16}}
    train(load_recipe(content, ["train.steps=2"]))
    log_lines.clear()
    changed = ["train.lr=1e-4", "train.weight_decay=5.0", "train.betas=[0.1, 0.2]", "method.beta=7.0"]
    train(load_recipe(content, changed))
    output = tmp_path / "out"
    state = torch.load(output / "checkpoint-00000004" / "state.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], list(group["betas"])) == (1e-4, 5.0, [0.1, 0.2])
    expected = {
        "train.lr: 0.001 -> 0.0001 from update 3 on",
        "train.weight_decay: 0.01 -> 5.0 from update 3 on",
        "train.betas: [0.9, 0.999] -> [0.1, 0.2] from update 3 on",
        "method.beta: 100.0 -> 7.0 from update 3 on",
    }
    assert expected <= set(log_lines)
    assert {str(change) for change in read_run_info(output / "model").record.changes} == expected
    # Page and result tell of what was trained, not of the recipe of their own command
    changed_recipe = load_recipe(content, ["train.lr=5", "method.beta=1", "train.steps=1000", "model.tune=lora"])
    page = gallery(changed_recipe).read_text(encoding="utf-8")
    assert (
        f"{Path(content['model']['path']).name} before and after diffusion_dpo" in page
        and "Before and after" not in page
    )
    provenance = json.loads((output / "gallery" / "manifest.json").read_text())["provenance"]
    assert provenance["method"] == "name diffusion_dpo, beta 7.0"
    assert provenance["training"] == "full, 4 updates of 2 pairs, lr 0.0001"
    assert "train.lr: 0.001 -> 0.0001 from update 3 on" in provenance["changed"]


@pytest.mark.slow
def test_history_after_a_resume_is_that_of_one_run(content: Content, tmp_path: Path) -> None:
    whole = train(load_recipe({**content, "output": str(tmp_path / "whole")}))
    train(load_recipe(content, ["train.steps=2"]))
    resumed = train(load_recipe(content))
    assert resumed.history[-1] == whole.history[-1] and resumed.verdict == whole.verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    name: str, content: Content, tmp_path: Path, log_lines: list[str]
) -> None:
    whole = train_weights({**content, "output": str(tmp_path / "whole")}, "train.steps=6")
    train(load_recipe(content))
    file = tmp_path / "out" / "checkpoint-00000004" / name
    sound = file.read_bytes()
    file.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])  # one flipped bit
    log_lines.clear()
    assert_same(train_weights(content, "train.steps=6"), whole)
    assert any(f"checkpoint-00000004: is damaged ({name} " in line for line in log_lines)
    assert "resuming from checkpoint-00000002" in log_lines


@pytest.mark.slow
def test_validation_pairs_of_the_training_are_refused(content: Content, tmp_path: Path) -> None:
    content["evaluate"] = {"benchmark": "implicit", "num_noise_samples": 1}
    train(load_recipe(content))
    with pytest.raises(ValueError, match=r"was trained on \d of the \d validation pairs"):
        evaluate(load_recipe(content, ["data.validation_fraction=0.5"]))
    held = {**content, "output": str(tmp_path / "held"), "data": {**content["data"], "validation_fraction": 0.5}}
    train(load_recipe(held))
    assert evaluate(load_recipe(held)).result["pairs"] > 0
    with pytest.raises(ValueError, match=r"train.seed 0"):
        evaluate(load_recipe(held, ["train.seed=1"]))


@pytest.mark.slow
def test_validation_prompts_of_spo_are_refused(tiny_sd15: Path, tiny_step_judge: Path, tmp_path: Path) -> None:
    reward = {"name": "step_aware", "path": str(tiny_step_judge)}
    method = {"name": "spo", "steps": 6, "start": 2, "threshold": 0.0, "reward": reward}
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", method=method)
    content["evaluate"] = {"benchmark": "implicit", "num_noise_samples": 1}
    train(load_recipe(content))
    with pytest.raises(ValueError, match=r"was trained on \d of the \d validation pairs"):
        evaluate(load_recipe(content, ["data.validation_fraction=0.5"]))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [(train, "model"), (evaluate, "evaluation")])
def test_folders_of_others_are_left_alone(command: Any, name: str, content: Content, tmp_path: Path) -> None:
    content["evaluate"] = {"benchmark": "scenes", "prompts": 2, "sampling": {"steps": 1, "resolution": 16}}
    if command is evaluate:
        train(load_recipe(content))
    own = tmp_path / "out" / name / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(ValueError, match="is a folder that mmalign did not write"):
        command(load_recipe(content))
    assert own.read_text() == "mine"


@pytest.mark.slow
def test_hidden_folders_of_others_are_left_alone(content: Content, tmp_path: Path) -> None:
    names = [".checkpoint-mine", ".checkpoint-00000002.backup", "checkpoint-mine", ".model", "evaluation"]
    for name in names:
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "notes.txt").write_text("mine")
    train(load_recipe(content))
    assert all((tmp_path / "out" / name / "notes.txt").is_file() for name in names)


@pytest.mark.slow
def test_exported_files_have_the_permissions_of_the_umask(content: Content, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        train(load_recipe(content))
    finally:
        os.umask(previous)
    files = [path for path in (tmp_path / "out").rglob("*.safetensors") if "cache" not in path.parts]
    assert files and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


@pytest.mark.slow
def test_dropout_of_adapters_resumes(tiny_sd15: Path, tmp_path: Path) -> None:
    content = recipes.diffusion_in(tiny_sd15, tmp_path / "run", model={"tune": "lora", "lora": {"dropout": 0.5}})
    assert_resumes(content)
