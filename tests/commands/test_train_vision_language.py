"""A whole run on tiny vision-language models, by the loop, checkpoint, recipe and report of diffusion models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mmalign
from mmalign.commands import train as train_module
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.modalities import loading
from mmalign.policy import AdaptersOff, FrozenCopy
from mmalign.training import checkpoint
from tests.helpers import STANDING_VLMS, Folders, data_files, first_fast, recipes
from tests.helpers.loading import load_vlm
from tests.helpers.runs import assert_resumes, assert_same, train_weights


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return data_files.response_pairs(tmp_path / "rows")


@pytest.fixture
def retrieved(tmp_path: Path) -> Path:
    """Pairs that come with another image."""
    return data_files.response_pairs(tmp_path / "rows", layout="realign")


@pytest.mark.slow
@pytest.mark.parametrize("method", first_fast(["dpo", "rlhfv"]))
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
def test_going_on_from_a_checkpoint_equals_never_stopping(
    method: str, tune: str, vlm_folders: Folders, rows: Path, tmp_path: Path
) -> None:
    """Bit for bit, with an average of the weights, accumulation, and a stop in the middle of an epoch."""
    options = {
        "steps": 3,
        "save_every": 1,
        "gradient_accumulation_steps": 2,
        "ema": 0.9,
        "schedule": "cosine",
        "warmup_steps": 1,
        "keep_checkpoints": 5,
    }
    content = recipes.vlm(
        vlm_folders("llava"), rows, tmp_path / "whole", model={"tune": tune}, method={"name": method}, train=options
    )
    assert_resumes(content)


@pytest.mark.slow
@pytest.mark.parametrize("method", first_fast(["mdpo", "povid", "realign", "response_sft"]))
def test_resuming_keeps_the_draws_of_image_noise(
    method: str, vlm_folders: Folders, retrieved: Path, tmp_path: Path
) -> None:
    """Two updates and two more, into the second epoch, are four; and two workers read what one process reads."""
    data, options = {"format": "realign"}, {"steps": 4, "batch_size": 4, "save_every": 2}
    content = recipes.vlm(
        vlm_folders("llava"), retrieved, tmp_path / "whole", method={"name": method}, data=data, train=options
    )
    whole = train_weights(content)
    stopped = {**content, "output": str(tmp_path / "stopped")}
    train_weights(stopped, "train.steps=2", "data.num_workers=2")
    assert_same(whole, train_weights(stopped))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "start"), first_fast([("mdpo", 3), ("povid", 1), ("realign", 2)]))
def test_methods_of_several_terms_learn_their_pairs(
    method: str, start: int, vlm_folders: Folders, retrieved: Path, tmp_path: Path
) -> None:
    """From ln 2 a term down; and the sides' log-probabilities are told apart from each other."""
    options = {"steps": 12, "batch_size": 8, "save_every": 12, "lr": 1e-2}
    content = recipes.vlm(
        vlm_folders("llava"),
        retrieved,
        tmp_path / "out",
        method={"name": method, **({"tokens": "reference"} if method == "povid" else {})},  # the policy's own follow it
        data={"format": "realign"},
        train=options,
    )
    trained = train(load_recipe(content))
    first, last = trained.history[0], trained.history[-1]
    assert first["loss"] == pytest.approx(start * 0.6931, abs=1e-3) and last["loss"] < 0.95 * first["loss"]
    assert last["text loss"] < first["text loss"]
    for side in ("chosen", "rejected"):
        moved = last[f"{side} log-probability"] - first[f"{side} log-probability"]
        assert moved == pytest.approx(last[f"{side} gain"], abs=1e-3)
    assert last["chosen gain"] > last["rejected gain"]


def test_the_baseline_needs_no_reference_and_says_what_it_did(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    options = {"steps": 8, "batch_size": 8, "save_every": 8, "lr": 1e-2}
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", method={"name": "response_sft"}, train=options)
    trained = train(load_recipe(content))
    assert trained.history[-1]["chosen log-probability"] > trained.history[0]["chosen log-probability"]
    assert trained.verdict.startswith("chosen responses improved (chosen log-probability ")


@pytest.mark.slow
def test_nll_keeps_the_chosen_responses_likely(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    """The same pairs and updates, with and without: with it the chosen responses end likelier."""
    options = {"steps": 12, "batch_size": 8, "save_every": 12, "lr": 1e-2}
    ends = []
    for nll in (0.0, 1.0):
        method = {"name": "dpo", "nll": nll}
        content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / f"{nll}", method=method, train=options)
        ends.append(train(load_recipe(content)).history[-1]["chosen log-probability"])
    assert ends[1] > ends[0] + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(STANDING_VLMS))
def test_each_model_type_starts_at_ln_2_and_learns(name: str, vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    options = {"steps": 12, "batch_size": 8, "save_every": 12, "lr": 1e-2}
    content = recipes.vlm(vlm_folders(name), rows, tmp_path / "out", train=options)
    trained = train(load_recipe(content))
    assert trained.history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert trained.history[-1]["loss"] < 0.65 and trained.history[-1]["accuracy"] == 1.0
    assert "responses" in trained.verdict or "sides" in trained.verdict


@pytest.mark.slow
def test_workers_and_recomputed_activations_change_no_number(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "here", train={"steps": 2})
    here = train_weights(content)
    assert_same(here, train_weights({**content, "output": str(tmp_path / "workers")}, "data.num_workers=2"))
    again = train_weights({**content, "output": str(tmp_path / "again")}, "train.gradient_checkpointing=true")
    for name, weight in here.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_trained_model_is_one_that_peft_loads_over_its_base(
    vlm_folders: Folders, rows: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    weights = train_weights(recipes.vlm(vlm_folders("qwen2_5_vl"), rows, tmp_path / "out", train={"steps": 2}))
    base = AutoModelForImageTextToText.from_pretrained(vlm_folders("qwen2_5_vl"))
    net = PeftModel.from_pretrained(base, tmp_path / "out" / "model")
    loaded = {name: p for name, p in net.named_parameters() if "lora_B" in name}
    policy_scores = {name: p for name, p in weights.items() if "lora_B" in name}
    assert len(loaded) == len(policy_scores) == 14
    assert sorted(float(p.sum()) for p in loaded.values()) == sorted(float(p.sum()) for p in policy_scores.values())


@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
def test_the_reference_is_what_tune_says_and_is_the_base_model(tune: str, vlm_folders: Folders) -> None:
    family: Any = load_vlm(vlm_folders("llava"))
    before = {name: p.detach().clone() for name, p in family.network.named_parameters()}
    recipe = load_recipe(recipes.vlm(vlm_folders("llava"), Path("x"), Path("y"), model={"tune": tune}))
    policy = train_module.build_policy(family, recipe)
    if tune == "lora":
        assert isinstance(policy.reference, AdaptersOff)
        assert sum(p.numel() for p in policy.trainable()) < 0.2 * sum(p.numel() for p in before.values())
    else:
        assert isinstance(policy.reference, FrozenCopy)
        reference_weights = dict(policy.reference.model.named_parameters())
        assert all(torch.equal(reference_weights[name], p) for name, p in before.items())


@pytest.mark.slow
def test_a_trained_model_is_found_again_beside_its_base(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    for tune in ("lora", "full"):
        output = tmp_path / tune
        train_weights(recipes.vlm(vlm_folders("llava"), rows, output, model={"tune": tune}, train={"steps": 2}))
        family: Any = load_vlm(vlm_folders("llava"))
        policy = loading.load_trained_policy(family, output / "model")
        assert isinstance(policy.reference, AdaptersOff if tune == "lora" else FrozenCopy)


def test_held_out_pairs_score_the_checkpoints(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", data={"validation_fraction": 0.4})
    train_weights(content)
    assert checkpoint.best(tmp_path / "out") is not None


@pytest.mark.slow
def test_over_long_prompts_are_counted_and_named_at_the_end(
    vlm_folders: Folders, rows: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    text = rows.read_text().splitlines()
    rows.write_text("\n".join([text[0].replace("Describe it.", "Describe it. " * 60), *text[1:]]))
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", data={"max_length": 80})
    train(load_recipe(content))
    assert any(
        line.startswith("1 images or pairs could not be used; their pairs were left out: trl.jsonl: line 1: the prompt")
        for line in log_lines
    )


@pytest.mark.usefixtures("no_model")
def test_method_without_its_other_images_is_refused_early(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", method={"name": "realign"})
    message = refused(content)
    assert message.startswith(
        f"data.path: {rows} has no other images, and method.name: realign compares a response to an image"
    )
    assert "use data.format: realign" in message


def refused(content: dict[str, Any], *overrides: str, command: Any = None) -> str:
    with pytest.raises(ValueError) as raised:
        (command or mmalign.train)(load_recipe(content, overrides))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_recipe_of_one_modality_has_no_keys_of_the_other(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out")
    assert "recipe: data has no 'crop'" in refused(content, "data.crop=center")
    assert "recipe: model has no 'vae'" in refused(content, "model.vae=x")
    assert "recipe: data.format: expected 'trl', 'povid'" in refused(content, "data.format=folder")
    images = recipes.diffusion(vlm_folders("llava"), rows, tmp_path / "out")
    assert "recipe: data has no 'max_length'" in refused(images, "data.max_length=3")


def test_model_of_other_modality_is_refused_early(
    vlm_folders: Folders, tiny_sd15: Path, rows: Path, tmp_path: Path
) -> None:
    content = recipes.vlm(tiny_sd15, rows, tmp_path / "out")
    assert "has no config.json; expected the folder of a vision-language model" in refused(content)
    pictures = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    images = recipes.diffusion(vlm_folders("llava"), pictures, tmp_path / "out", data={"resolution": 16})
    assert "has no model_index.json; expected the folder of a diffusers pipeline" in refused(images)


def test_what_is_for_images_alone_says_so(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    """Judges of images, and settings of their generation."""
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out")
    judged = refused(content, "method={name: online_dpo, reward: {path: models/tiny_clip}}")
    assert judged.startswith("reward: open_clip judges images; for responses use one of chair, function, http, vlm")
    drawn = refused(content, "prepare={kind: bdhs, source: {path: x}, images_per_prompt: 4}")
    assert drawn.startswith("recipe: prepare has no 'images_per_prompt'; it has")


def test_a_checkpoint_of_other_adapters_is_refused(vlm_folders: Folders, rows: Path, tmp_path: Path) -> None:
    content = recipes.vlm(vlm_folders("llava"), rows, tmp_path / "out", train={"steps": 2})
    train_weights(content)
    message = refused(content, "model.lora.targets=[q_proj]", "train.steps=4")
    assert (
        "belongs to another run (tune lora of rank 2, alpha 2, on down_proj gate_proj k_proj o_proj q_proj" in message
    )


def test_response_sft_trains_on_answers_alone(vlm_folders: Folders, tmp_path: Path) -> None:
    """With the weights of the same rows with rejected responses, which it does not read; other methods need them."""
    pairs = data_files.response_pairs(tmp_path / "rows")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    data_files.write_jsonl(
        pairs.with_name("answers.jsonl"), *({**row, "answer": row["chosen"], "rejected": None} for row in rows)
    )

    def content(name: str, method: str = "response_sft") -> dict[str, Any]:
        data = {"format": name, "path": str(pairs.with_name(f"{name}.jsonl"))}
        return recipes.vlm(vlm_folders("llava"), pairs, tmp_path / name, method={"name": method}, data=data)

    assert_same(train_weights(content("trl")), train_weights(content("answers")))
    with pytest.raises(ValueError, match=r"data\.path: .* has answers alone, and method\.name: dpo compares them"):
        train(load_recipe(content("answers", "dpo")))
    with pytest.raises(ValueError, match=r"evaluate\.benchmark: implicit compares them with rejected ones"):
        train(load_recipe(content("answers"), ["evaluate={benchmark: implicit}", "data.validation_fraction=0.5"]))
