"""A whole run on tiny models of the real classes: resuming, caching, workers, every shipped recipe."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmalign
from mmalign import atomic_io
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.methods import requirements_of
from mmalign.resources import roots
from mmalign.rewards import load_reward_model
from mmalign.training import checkpoint
from tests.helpers import Folders, data_files, first_fast, recipes
from tests.helpers.runs import assert_resumes, assert_same, train_weights

RECIPES = sorted((roots()[1] / "configs").glob("*_*/*.yaml"))
# The tiny model of a vision-language recipe, by what the recipe's name ends in.
MODELS = {
    "llava": "llava",
    "llava15": "llava",
    "llava16": "llava_next",
    "paligemma": "paligemma",
    "quickstart": "llava",
    "qwen25vl": "qwen2_5_vl",
    "qwen3vl": "qwen3_vl",
    "smolvlm": "idefics3",
}
# The tiny flow-matching model of a recipe, by what the recipe's name has in it.
FLOWS = {"sd35m": "sd3", "flux": "flux"}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """With a second prompt each, which one method needs and the others never look at."""
    return data_files.pick_a_pic(tmp_path / "pairs.parquet", rejected={})


def saved(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tune"),
    [
        *((method, "full") for method in ("diffusion_dpo", "cca", "inpo", "instruct_engine", "mapo", "sft", "spo")),
        *((method, "lora") for method in ("diffusion_dpo", "spo")),
    ],
)
def test_going_on_from_a_checkpoint_equals_never_stopping(
    method: str, tune: str, tiny_sd15: Path, tiny_step_judge: Path, pairs: Path, tmp_path: Path
) -> None:
    """Bit for bit, with an average of the weights, accumulation, and a stop in the middle of an epoch.

    A batch of spo is two updates here, and is gone on from where it ends.
    """
    of_steps = {
        "steps": 6,
        "start": 2,
        "threshold": 0.0,
        "reward": {"name": "step_aware", "path": str(tiny_step_judge)},
    }
    steps = 4 if method == "spo" else 3
    options = {
        "gradient_accumulation_steps": 2,
        "ema": 0.9,
        "schedule": "cosine",
        "warmup_steps": 1,
        "keep_checkpoints": 5,
    }
    content = recipes.diffusion(
        tiny_sd15,
        pairs,
        tmp_path / "whole",
        model={"tune": tune},
        method={"name": method, **(of_steps if method == "spo" else {})},
        train={"steps": steps, "save_every": 1, **options},
    )
    assert_resumes(content)
    assert saved(tmp_path / "whole") == ([2, 4] if method == "spo" else [1, 2, 3])


def step_preference(denoiser: Path, judge: Path, pairs: Path, output: Path, **train: Any) -> dict[str, Any]:
    """A recipe that trains a step-aware judge."""
    content = recipes.diffusion(judge, pairs, output, method={"name": "step_preference"}, train=train)
    return {**content, "model": {"path": str(judge), "denoiser": str(denoiser)}}


@pytest.mark.slow
@pytest.mark.parametrize("model", first_fast(["tiny_sd15", "tiny_sdxl"]))
def test_a_judge_is_trained_by_the_same_loop_and_judges(
    model: str, tiny_clip: Path, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It goes on bit for bit, can be trained further, and what a run leaves is the judge of another recipe."""
    content = step_preference(request.getfixturevalue(model), tiny_clip, pairs, tmp_path / "a", steps=2, save_every=1)
    whole = assert_resumes(content)
    shutil.copytree(request.getfixturevalue(model), tmp_path / "another")
    elsewhere = {**content["model"], "denoiser": str(tmp_path / "another")}
    with pytest.raises(ValueError, match=r"belongs to another run \(denoiser "):
        train_weights({**content, "model": elsewhere})
    assert_same(load_file(tmp_path / "a" / "model" / "step_aware.safetensors"), whole)
    further = {
        **content,
        "output": str(tmp_path / "c"),
        "model": {**content["model"], "path": str(tmp_path / "a/model")},
    }
    train_weights(further)
    reward_model = load_reward_model("step_aware", str(tmp_path / "c" / "model"))
    scores = reward_model([Image.new("RGB", (16, 16))] * 2, ["a", "a"], torch.tensor([1, 901]))
    assert scores[0] != scores[1]


@pytest.mark.slow
def test_a_judge_learns_to_tell_the_pairs_apart(tiny_sd15: Path, tiny_clip: Path, pairs: Path, tmp_path: Path) -> None:
    """White upper halves are preferred, and survive noise; the random judge begins near ln 2."""
    options = {"steps": 60, "batch_size": 8, "lr": 2e-3, "save_every": 60}
    content = step_preference(tiny_sd15, tiny_clip, pairs, tmp_path / "out", **options)
    trained = train(load_recipe(content, ["method.guidance=1.0"]))
    late = trained.history[-10:]
    assert sum(h["loss"] for h in late) / 10 < 0.5
    assert sum(h["accuracy"] for h in late) / 10 > 0.75


@pytest.mark.slow
def test_reward_without_sure_pairs_stops_the_run(
    tiny_sd15: Path, tiny_clip: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an epoch, or before its end after many batches without a pair; nothing is saved."""
    method = {"name": "spo", "steps": 4, "start": 2, "threshold": 0.999999, "reward": {"path": str(tiny_clip)}}
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", method=method)
    with pytest.raises(
        ValueError, match=r"epoch 0 has nothing to learn.*: the reward model was not sure of any pair; lower"
    ):
        train(load_recipe(content))
    monkeypatch.setattr("mmalign.training.loop.MAX_EMPTY_BATCHES", 3)
    with pytest.raises(
        ValueError, match=r"3 batches in a row, .* had nothing to learn .*: the reward model was not sure of any"
    ):
        train(load_recipe(content))
    assert checkpoint.latest(tmp_path / "out") is None


@pytest.fixture
def steps_of_spo(tiny_sd15: Path, tiny_step_judge: Path, pairs: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of SPO whose batches are four updates each."""
    judge = {"name": "step_aware", "path": str(tiny_step_judge)}
    method = {"name": "spo", "steps": 6, "start": 2, "threshold": 0.0, "reward": judge}
    options = {"save_every": 2, "keep_checkpoints": 1, "ema": 0.9}
    return recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", method=method, train=options)


@pytest.mark.slow
def test_a_run_that_ends_inside_a_batch_is_done(
    steps_of_spo: dict[str, Any], tmp_path: Path, log_lines: list[str]
) -> None:
    """Its last checkpoint is written, and the same command again trains nothing; the one to go on from is kept."""
    done = train(load_recipe(steps_of_spo, ["train.steps=6"]))
    assert saved(tmp_path / "out") == [4, 6]
    model = tmp_path / "out" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_file(model)
    log_lines.clear()
    again = train(load_recipe(steps_of_spo, ["train.steps=6"]))
    assert (again.verdict, again.history) == (done.verdict, done.history) and done.verdict
    assert "resuming from checkpoint-00000006" in log_lines
    assert_same(before, load_file(model))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), first_fast([(3, 4), (6, 9), (8, 9)]))
def test_extended_run_equals_an_uninterrupted_one(
    first: int, then: int, steps_of_spo: dict[str, Any], tmp_path: Path, log_lines: list[str]
) -> None:
    """Bit for bit: what it had made of its last batch is thrown away."""
    train_weights(steps_of_spo, f"train.steps={first}")
    log_lines.clear()
    train(load_recipe(steps_of_spo, [f"train.steps={then}"]))
    assert any("ended inside a batch" in line for line in log_lines) == (first in (3, 6))
    assert not any(line == "resuming from checkpoint-00000006" for line in log_lines)
    whole = train_weights({**steps_of_spo, "output": str(tmp_path / "whole")}, f"train.steps={then}")
    assert_same(whole, load_file(tmp_path / "out" / f"checkpoint-{then:08d}" / "model.safetensors"))


def test_weights_broken_inside_a_batch_are_not_saved(steps_of_spo: dict[str, Any], tmp_path: Path) -> None:
    """The last update overflows, and no loss is computed after it that could tell."""
    with pytest.raises(atomic_io.CheckpointError, match="after update 1 the weights are not finite"):
        train_weights(steps_of_spo, "train.steps=1", "train.lr=1e39", "train.ema=null")
    assert saved(tmp_path / "out") == [] and not (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_no_images_are_drawn_to_look_at_a_loss(steps_of_spo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight updates are two batches, each of which is saved after."""
    from mmalign.methods.text_to_image import spo

    result, contrasts = list[int](), spo.contrasts

    def counted(*args: Any) -> Any:
        result.append(1)
        return contrasts(*args)

    monkeypatch.setattr(spo, "contrasts", counted)
    train_weights(steps_of_spo, "train.steps=8")
    assert len(result) == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.reward.path=models/no_judge", "method.reward.path: there is no file or folder 'models/no_judge'"),
        ("method.reward.name=stepaware", "reward: there is no 'stepaware'"),
        ("data={format: prompts, path: none.txt}", "data.path: none.txt does not exist; expected a text file with"),
        ("data.flip=true", "data.flip: means nothing here: method.name: spo generates its own images, and"),
        ("data.num_workers=2", r"data.num_workers: .* from the pairs of data.path; leave num_workers out"),
        ("data={format: prompts, path: a.txt, split: train}", r"data.split: .* text file with .*; leave split out"),
        ("data={format: prompts, path: a.txt, columns: {a: b}}", "data.columns: means nothing here"),
        ("data={format: prompts, path: a.txt, crop: random, max_bad: 1}", "; leave max_bad and crop out"),
        ("data.group_by=caption", "data.group_by: means nothing here"),
    ],
)
def test_what_spo_needs_is_looked_for_before_a_model_is_loaded(
    override: str, sentence: str, tiny_sd15: Path, tiny_clip: Path, pairs: Path, tmp_path: Path
) -> None:
    content = recipes.diffusion(
        tiny_sd15, pairs, tmp_path / "out", method={"name": "spo", "reward": {"path": str(tiny_clip)}}
    )
    with pytest.raises(ValueError, match=sentence):
        train(load_recipe(content, [override]))


def test_prompts_are_no_pairs(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a hen")
    content = recipes.diffusion(tiny_sd15, tmp_path / "prompts.txt", tmp_path / "out", data={"format": "prompts"})
    with pytest.raises(
        ValueError, match=r"data\.format: prompts has no images, and the method compares those of pairs"
    ):
        train(load_recipe(content))


@pytest.mark.slow
@pytest.mark.parametrize("method", first_fast(["diffusion_dpo", "instruct_engine"]))
def test_workers_and_cache_do_not_change_the_result(method: str, tiny_sdxl: Path, pairs: Path, tmp_path: Path) -> None:
    """Latents and text from a cache, read here or by two workers, or encoded in every batch: bit for bit the same."""
    flipped = {"method": {"name": method}, "data": {"flip": True}, "train": {"steps": 2, "batch_size": 1}}
    cached = train_weights(recipes.diffusion(tiny_sdxl, pairs, tmp_path / "cached", **flipped))
    workers = train_weights(recipes.diffusion(tiny_sdxl, pairs, tmp_path / "workers", **flipped), "data.num_workers=2")
    assert_same(cached, workers)
    assert_same(
        cached, train_weights(recipes.diffusion(tiny_sdxl, pairs, tmp_path / "uncached", **flipped), "data.cache='off'")
    )


@pytest.mark.slow
def test_a_trained_model_is_a_pipeline_that_diffusers_loads(tiny_sd15: Path, pairs: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    for tune in ("full", "lora"):
        output = tmp_path / tune
        weights = train_weights(recipes.diffusion(tiny_sd15, pairs, output, model={"tune": tune}, train={"steps": 2}))
        assert weights
        if tune == "full":
            pipe = StableDiffusionPipeline.from_pretrained(output / "model", safety_checker=None)
            name = "conv_in.weight"
            assert torch.equal(pipe.unet.state_dict()[name], weights[name])
        else:
            pipe = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None)
            pipe.load_lora_weights(output / "model")
            loaded = {k: v for k, v in pipe.unet.state_dict().items() if "lora" in k}
            assert len(loaded) == len(weights)


@pytest.mark.slow
@pytest.mark.parametrize("path", first_fast(RECIPES), ids=lambda p: p.stem)
def test_every_shipped_recipe_takes_two_steps(
    path: Path,
    tiny_sd15: Path,
    tiny_sdxl: Path,
    flow_folders: Folders,
    tiny_clip: Path,
    tiny_transformers_clip: Path,
    tiny_step_judge: Path,
    vlm_folders: Folders,
    pairs: Path,
    tmp_path: Path,
) -> None:
    """As it is written, but for the model's size, the pairs, and what a CPU cannot do (float16, 8-bit optimizers)."""
    judges: list[str] = []
    if path.parent.name == "vision_language":
        layout = load_recipe(path).data.format  # type: ignore[attr-defined]
        rows = data_files.response_pairs(tmp_path / "rows", layout="trl" if layout == "auto" else layout)
        model = vlm_folders(MODELS[path.stem.rpartition("_")[2]])
        sizes = [f"data.path={rows}", "data.images=null", "data.max_length=null"]
        if requirements_of(load_recipe(path).method).generates:  # random weights name no object
            judges = ["method.reward={name: function, path: 'tests.helpers.judging:letters'}"]
    else:
        flows = [folder for name, folder in FLOWS.items() if f"_{name}" in path.stem]
        model = flow_folders(flows[0]) if flows else tiny_sdxl if "sdxl" in path.stem else tiny_sd15
        method = load_recipe(path).method
        if requirements_of(method).learns_from == "lists":  # of images for one prompt
            pairs = data_files.pick_a_pic(tmp_path / "lists.parquet")
        sizes = ["model.vae=null", "model.vae_dtype=float32", f"data.path={pairs}", "data.resolution=16"]
        if method.name == "spo":  # any pair will do: the tiny judge is hardly sure of one
            judges = [f"method.reward.path={tiny_step_judge}", "method.threshold=0.0", "data.format=pick_a_pic"]
        elif requirements_of(method).generates:
            judges = ["method.generation.images=3", "method.generation.steps=3", "data.format=pick_a_pic"]
            judges.append(f"method.reward={{path: {tiny_clip}}}")
        elif method.name == "bradley_terry":
            model, sizes = tiny_clip, [f"data.path={pairs}"]
        elif method.name == "step_preference":
            judges = ["model.denoiser=" + str(model)]
            model = tiny_transformers_clip if "PickScore" in load_recipe(path).model.path else tiny_clip
            judges += [f"method.reward.path={model}"] if method.reward is not None else []
    overrides = [
        f"model.path={model}",
        *sizes,
        *judges,
        "data.limit=4",
        "data.num_workers=0",
        "data.validation_fraction=0.0",
        "data.split=null",
        "data.group_by=null",
        "train.steps=2",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=1",
        "train.warmup_steps=1",
        "train.trackers=[]",
        f"output={tmp_path / 'out'}",
    ]
    recipe = load_recipe(str(path), overrides)
    if recipe.train.precision == "float16":
        overrides.append("train.precision=bfloat16")
    if recipe.train.optimizer == "adamw_8bit":
        overrides.append("train.optimizer=adamw")
    if recipe.evaluate is not None:
        overrides.append("evaluate=null")
    overrides.append("prepare=null")
    trained = mmalign.train(load_recipe(str(path), overrides))
    assert trained.steps == 2
    assert all(torch.isfinite(torch.tensor(list(h.values()))).all() for h in trained.history)


@pytest.mark.slow
def test_validation_pairs_select_the_best_checkpoint(tiny_sd15: Path, tmp_path: Path) -> None:
    pairs = data_files.pick_a_pic(tmp_path / "pairs.parquet", number=12)
    content = recipes.diffusion(
        tiny_sd15,
        pairs,
        tmp_path / "out",
        data={"validation_fraction": 0.4},
        train={"steps": 6, "save_every": 1, "keep_checkpoints": 1, "lr": 0.05},
    )
    train_weights(content)
    left = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    best = checkpoint.best(tmp_path / "out")
    assert best is not None and best.name in left
    assert left[-1] == "checkpoint-00000006" and len(left) <= 2


@pytest.mark.slow
def test_training_starts_at_ln_2_and_learns(tiny_sd15: Path, pairs: Path, tmp_path: Path) -> None:
    method = {"name": "diffusion_dpo", "beta": 100.0, "caption_dropout": 0.0}
    options = {"steps": 60, "batch_size": 8, "lr": 2e-3, "save_every": 60}
    content = recipes.diffusion(tiny_sd15, pairs, tmp_path / "out", method=method, train=options)
    trained = train(load_recipe(content))
    assert trained.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    late = trained.history[-10:]
    assert sum(h["loss"] for h in late) / 10 < 0.6
    assert sum(h["accuracy"] for h in late) / 10 > 0.7
