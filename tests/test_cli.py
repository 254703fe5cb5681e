"""The command line: its help, a whole run on a tiny model, and the same commands again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands import train
from mmalign.commands._after_update import AfterUpdate
from mmalign.families.precision import computes_bfloat16
from mmalign.methods import names
from mmalign.toy import scenes
from tests.helpers import data_files, first_fast, recipes
from tests.helpers.loading import load_diffusion

COMMANDS = (
    "bench",
    "init",
    "plan",
    "cache",
    "doctor",
    "quickstart",
    "train",
    "evaluate",
    "gallery",
    "compare",
    "prepare",
    "show",
    "explain",
    "export",
    "list",
)
EVALUATE = {"benchmark": "scenes", "prompts": 4, "sampling": {"steps": 1}}


def run(*arguments: object) -> str:
    """What a command that succeeds prints."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command that fails, in words."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def recipe(tiny_sd15: Path, tmp_path: Path) -> Path:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", train={"steps": 2}, evaluate=EVALUATE)
    return write(tmp_path / "recipe.yaml", content)


def weights(folder: Path) -> dict[str, bytes]:
    """Every network's file (a tokenizer's holds the padding that it was last used with)."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.slow
def test_every_command_says_what_it_does() -> None:
    listed = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert sorted(listed) == sorted(COMMANDS)
    overview = run("--help")
    for command in COMMANDS:
        assert command in overview
        assert "Usage: " in run(command, "--help")
        assert f"For example: mmalign {command}" in run(command, "--help")
    assert "--set" in run("train", "--help") and "KEY=VALUE" in run("train", "--help")


def test_version_is_printed() -> None:
    assert run("--version") == f"mmalign {mmalign.__version__}\n"


def test_values_after_the_recipe_override_it(recipe: Path, tmp_path: Path) -> None:
    run("train", recipe, "train.lr=1e-2", "train.steps=1")
    settings = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["train"]
    assert (settings["lr"], settings["steps"]) == (0.01, 1)


def test_list_names_what_there_is() -> None:
    printed = run("list")
    for name in (*names(), "stable_diffusion", "sdxl", "open_clip", "text_to_image/quickstart "):
        assert name in printed
    rows = [row.split() for row in printed.splitlines()]
    for first in (["bco_pair", "yes", "sum"], ["bco", "Binary"], ["rrhf", "Hinge"], ["votes", "prompt,"], ["rlhfv"]):
        assert first in [row[: len(first)] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "x.yaml", "--set"], "requires an argument"),
        (["train", "x.yaml", "--lr", "1"], "No such option: --lr"),
    ],
)
def test_a_wrong_call_is_told_how_it_goes(arguments: list[str], sentence: str) -> None:
    code, printed = refused(*arguments)
    assert code == 2 and sentence in printed


@pytest.mark.slow
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
def test_train_evaluate_gallery(tune: str, recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", f"model.tune={tune}", "--set", "model.lora={rank: 4, alpha: 32.0}", "--set", "train.lr=1e-2")
    out = tmp_path / "out"
    printed = run("train", recipe, *settings)
    assert "trainable parameters" in printed and "0.00M" not in printed
    call = "pipeline.load_lora_weights" if tune == "lora" else "DiffusionPipeline.from_pretrained"
    assert printed.splitlines()[-2:] == [
        f'{out / "model"}: the trained model; load it with {call}("{out / "model"}")',
        f"next: mmalign evaluate {out / 'recipe.yaml'}",
    ]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["train"]["lr"] == 0.01
    table = run("evaluate", recipe, *settings)
    assert "prompts fulfilled" in table and "before, %" in table
    result = json.loads((out / "evaluation" / "result.json").read_text())
    assert {"before", "after", "difference"} <= result["overall"].keys()
    assert str(out / "gallery" / "index.html") in run("gallery", out / "recipe.yaml")
    assert Image.open(out / "gallery" / "gallery.png").size[0] > 0
    before, after = ([p.read_bytes() for p in sorted((out / "evaluation" / s).iterdir())] for s in ("before", "after"))
    assert len(before) == len(after) == 4 and before != after


@pytest.mark.slow
def test_adapters_are_read_back_as_they_were_trained(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where alpha is not the rank, which the weights alone do not say."""
    import torch

    from mmalign.commands.load_recipe import load_recipe
    from mmalign.modalities import loading

    trained: list[torch.nn.Module] = []
    export = train.export

    def exported(folder: Path, run: Any) -> None:
        trained.append(run.policy.unwrapped)
        export(folder, run)

    monkeypatch.setattr(train, "export", exported)
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    tuned = {"tune": "lora", "lora": {"rank": 4, "alpha": 32.0}}
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", model=tuned, train={"steps": 2, "lr": 1e-2})
    folder = train.train(load_recipe(content)).folder
    policy = loading.load_trained_policy(load_diffusion(tiny_sd15), folder)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)

    def answer(net: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return net.eval()(x, torch.tensor([500]), text)[0]  # type: ignore[no-any-return]

    actual, expected, base = answer(trained[0]), answer(policy.unwrapped), policy.on_reference(answer)
    assert torch.equal(actual, expected) and base is not None and not torch.equal(actual, base)


@pytest.mark.slow
def test_a_finished_run_says_so_and_stays_the_same(recipe: Path, tmp_path: Path) -> None:
    run("train", recipe)
    before = weights(tmp_path / "out" / "model")
    printed = run("train", recipe)
    assert "all updates were done already: nothing was trained; raise train.steps" in printed
    assert len(before) == 3 and weights(tmp_path / "out" / "model") == before
    assert "resuming from checkpoint-00000002" in run("train", recipe, "--set", "train.steps=3")
    assert json.loads((tmp_path / "out" / "model" / "trained.json").read_text())["step"] == 3


@pytest.mark.slow
def test_a_finished_run_writes_a_lost_model_again(recipe: Path, tmp_path: Path) -> None:
    run("train", recipe)
    before = weights(tmp_path / "out" / "model")
    (tmp_path / "out" / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    run("train", recipe)
    assert weights(tmp_path / "out" / "model") == before


@pytest.mark.slow
def test_the_gallery_is_of_the_model_as_it_is(recipe: Path, tmp_path: Path) -> None:
    """Evaluates by itself, once, and again when the model has been trained on or other things are asked for."""
    samples = tmp_path / "out" / "evaluation" / "samples.json"
    run("train", recipe)
    assert "prompts fulfilled" in run("gallery", recipe)
    assert "prompts fulfilled" not in run("gallery", recipe)
    run("train", recipe, "--set", "train.steps=3")
    assert "prompts fulfilled" in run("gallery", recipe, "--set", "train.steps=3")
    assert json.loads(samples.read_text())["of"]["trained"]["step"] == 3
    assert "prompts fulfilled" in run("gallery", recipe, "--set", "train.steps=3", "--set", "evaluate.prompts=5")
    assert len(json.loads(samples.read_text())["samples"]) == 5


@pytest.mark.slow
def test_prepare_writes_pairs_that_train_reads(recipe: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "new" / "drawn.parquet"
    settings = [
        "--set",
        f"data.path={drawn}",
        "--set",
        "prepare={prompts: 4, images_per_prompt: 2, min_confidence: 0.5}",
    ]
    settings += ["--set", "prepare.reward.path=models/tiny_clip", "--set", "prepare.sampling.steps=1"]
    assert f"{drawn}: 4 pairs of 4 prompts" in run("prepare", recipe, *settings)
    assert "4 pairs in 4 groups" in run("train", recipe, *settings)
    code, printed = refused("prepare", recipe, *settings)
    assert code == 1 and "already exists" in printed  # hours of drawing are not written over


@pytest.mark.slow
def test_prepare_writes_pairs_with_two_prompts_that_train_reads(recipe: Path, tmp_path: Path) -> None:
    """Of the bundled world, and of a file with couples of prompts."""
    drawn, couples = tmp_path / "drawn.parquet", tmp_path / "couples.txt"
    couples.write_text("# the judge has never heard of any\na fox\ta hen\n\none owl\ttwo owls\n")
    settings = [
        "--set",
        "prepare={prompt_pairs: true, images_per_prompt: 2, min_confidence: 0.5, reward: {path: models/tiny_clip}}",
    ]
    settings += ["--set", "prepare.sampling.steps=1", "--set", f"data.path={drawn}", "--set", "prepare.prompts=12"]
    printed = run("prepare", recipe, *settings)
    rows = pq.read_table(drawn).to_pylist()
    assert f"{drawn}: {len(rows)} pairs of 12 prompt pairs, from 48 images" in printed
    for row in rows:
        assert row["label_0"] == 1.0 and row["jpg_0"] != row["jpg_1"] and row["caption"] != row["rejected_caption"]
        for prompt in (row["caption"], row["rejected_caption"]):
            assert scenes.split_of(scenes.parse(prompt)) == "train"
    assert f"{len(rows)} pairs in " in run("train", recipe, *settings, "--set", "method={name: instruct_engine}")
    drawn.unlink()
    message = run("prepare", recipe, *settings, "--set", f"prepare.prompts={couples}", "--set", "prepare.seed=3")
    assert "pairs of 2 prompt pairs, from 8 images" in message
    result = {(row["caption"], row["rejected_caption"]) for row in pq.read_table(drawn).to_pylist()}
    assert result and result <= {("a fox", "a hen"), ("one owl", "two owls")}


@pytest.mark.slow
def test_control_c_says_how_to_go_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its second update, the run goes on from there, and ends as one that was never stopped."""
    run("train", recipe, "--set", f"output={tmp_path / 'whole'}", "--set", "train.steps=4")
    update = AfterUpdate.__call__

    def stopped(hook: Any, progress: Any, metrics: Any) -> None:
        update(hook, progress, metrics)
        if progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AfterUpdate, "__call__", stopped)
        code, printed = refused("train", recipe, "--set", "train.steps=4")
    assert code == 130 and printed.endswith("stopped; the same command resumes from what was saved, if anything was\n")
    assert "resuming from checkpoint-00000002" in run("train", recipe, "--set", "train.steps=4")
    assert weights(tmp_path / "whole" / "model") == weights(tmp_path / "out" / "model")


def test_what_is_not_the_users_mistake_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("mmalign.commands.train.train", broken)
    result = CliRunner().invoke(cli.app, ["train", str(recipe)])
    assert isinstance(result.exception, AssertionError)


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_traceback_can_be_had(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_TRACEBACK", "1")
    result = CliRunner().invoke(cli.app, [command, "nothing.yaml"])
    assert isinstance(result.exception, ValueError) and not isinstance(result.exception, typer.Exit)


@pytest.mark.slow
def test_a_process_prints_its_own_sentences_and_no_librarys(recipe: Path, tmp_path: Path) -> None:
    """From nothing imported: no notices on the way to success, none before a mistake's sentence."""
    # A caption that the text encoder cuts, which diffusers and transformers would each remark on at length.
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    rows[0]["caption"] = "word " * 2000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    environment = {**os.environ, "PYTHONPATH": str(Path(mmalign.__file__).parents[1]), "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "mmalign", "train", str(recipe), "--set", "train.precision=bfloat16"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    lines.remove("1 of 8 prompts exceed the text encoder's limit and are truncated")
    slow = [] if computes_bfloat16(torch.device("cpu")) else ["warning"]  # by this machine's instructions
    assert [line.partition(":")[0] for line in lines] == [
        "8 pairs; update",
        *slow,
        "attention",
        "diffusion_dpo",
        "diffusion_dpo",
        str(tmp_path / "out" / "model"),
        "next",
    ]
    expected = ("update ", "warning: mean |logit|")
    assert not [line for line in ended.stderr.splitlines() if not line.startswith(expected)]
