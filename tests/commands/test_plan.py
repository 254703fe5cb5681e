"""`mmalign plan`: predicted beside measured memory, configurations alone, and what to switch on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.commands import _plan_memory
from mmalign.commands import plan as command
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.plan import plan
from mmalign.commands.train import describe_updates, pairs_per_update
from mmalign.config.methods.text_to_image import SFTConfig, SPOConfig
from mmalign.methods import requirements_of
from mmalign.training.optim import build_optimizer
from tests.helpers import data_files, recipes

FULL: dict[str, Any] = {
    "model": {"tune": "full"},
    "train": {"precision": "bfloat16", "gradient_accumulation_steps": 2, "ema": 0.9},
}


def without_weights(model: Path, folder: Path) -> Path:
    """Copy a model without its weights."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


@pytest.mark.slow
def test_a_plan_needs_configurations_alone(tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = without_weights(tiny_sd15, tmp_path / "model")
    content = recipes.diffusion_in(bare, tmp_path / "run", **FULL)
    result = plan(load_recipe(content), memory=1.0, json=tmp_path / "plan.json")
    assert result.largest_batch and not result.remedies
    assert result.training["weights: policy"] == result.training["weights: frozen reference"]
    assert result.activations[1] < result.activations[2] < result.activations[4]
    assert set(result.disk) == {"text", "latents", "checkpoints"} and set(result.leaving) == {"vae", "text_encoder"}
    assert json.loads((tmp_path / "plan.json").read_text())["peak"] == result.peak
    assert "fits: 1 GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_of_a_single_file_reads_no_weights(tiny_sd15: Path, tmp_path: Path) -> None:
    bare, file = without_weights(tiny_sd15, tmp_path / "model"), tmp_path / "model.safetensors"
    file.write_bytes(b"")
    content = recipes.diffusion_in(bare, tmp_path / "run", **FULL)
    single = load_recipe(content, [f"model.path={file}", f"model.config={bare}", f"model.vae={bare / 'vae'}"])
    assert plan(single) == plan(load_recipe(content))


@pytest.mark.slow
def test_a_prediction_is_what_an_update_takes(tiny_sd15: Path, tmp_path: Path) -> None:
    """A CPU's counter of live tensors; the stated limit of 15 % leaves room for the optimizer's temporaries."""
    result = plan(load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path / "run", **FULL)), probe=True)
    assert result.measured is not None
    measured, predicted = result.measured
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_a_prediction_of_a_vision_language_model(vlm_folders: Any, tmp_path: Path) -> None:
    rows = data_files.response_pairs(tmp_path)
    result = plan(load_recipe(recipes.vlm(vlm_folders("llava"), rows, tmp_path / "output")), probe=True)
    assert result.measured is not None
    measured, predicted = result.measured
    assert predicted == pytest.approx(measured, rel=0.15)


def test_remedies_come_in_order_up_to_the_first_that_fits(tiny_sd15: Path, tmp_path: Path, monkeypatch: Any) -> None:
    peaks = iter((900, 800, 700, 600, 500))
    monkeypatch.setattr(command, "estimate", lambda *_, **__: None)
    monkeypatch.setattr(command, "_peak", lambda *_, **__: next(peaks))
    content = recipes.diffusion_in(tiny_sd15, tmp_path / "run", train={"gradient_accumulation_steps": 3})
    remedies = list(command._remedies(load_recipe(content), None, 700, ()))
    assert [remedy.settings for remedy in remedies] == [
        ("train.gradient_checkpointing=true",),
        ("train.batch_size=1", "train.gradient_accumulation_steps=6"),
        ("model.tune=lora",),
    ]


def test_missing_configurations_are_named(tiny_sd15: Path, tmp_path: Path) -> None:
    content = recipes.diffusion_in(tiny_sd15, tmp_path / "run", model={"path": "nobody/no-such-model"})
    with pytest.raises(ValueError, match=r"model_index\.json with every part's config\.json.*hf download"):
        plan(load_recipe(content))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_optimizers_state_has_these_bytes(name: str) -> None:
    parameters = [nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(7))]
    optimizer = build_optimizer(parameters, name, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert _plan_memory.optimizer_bytes(parameters, name) == sum(x.nbytes for x in tensors if x.dim())


def test_autocast_of_cuda_has_a_rule_for_each_function() -> None:
    for name in _plan_memory.FLOAT32_ON_CUDA:
        kernel = "aten::softmax.int" if name == "softmax" else f"aten::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "AutocastCUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "AutocastCPU")


def test_many_epochs_are_called_few_pairs(tiny_sd15: Path, tmp_path: Path) -> None:
    options = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path / "run", train={"steps": 3200})).train
    needs = requirements_of(SFTConfig())
    assert describe_updates(options, needs, 4, 1).endswith("3,200 updates are 1,600 epochs: few pairs")
    assert describe_updates(options, needs, 6400, 1).endswith("3,200 updates are 1 epochs")


@pytest.mark.slow
def test_guidance_doubles_the_rows_of_a_sampler_s_step(tiny_sd15: Path, tmp_path: Path) -> None:
    """A pair of SPO's runs the network once, from its start; after inner steps each of its two steps has its own."""
    reward = {"name": "function", "path": "none:none"}
    estimates = []
    for guidance in (1.0, 4.5):
        method = {"name": "flow_grpo", "reward": reward, "generation": {"images": 2, "steps": 2, "guidance": guidance}}
        recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path / "run", method=method))
        estimates.append(_plan_memory.estimate(recipe, None, on_card=False).activations)
    assert estimates[0](1) < estimates[0](2) == estimates[1](1)
    rows = [
        requirements_of(SPOConfig(reward=reward, inner_steps=inner, guidance=guidance)).contrasts(3).rows_per_pair
        for inner, guidance in ((0, 1.0), (0, 5.0), (1, 1.0), (1, 5.0))
    ]
    assert rows == [1, 2, 2, 4]


def test_updates_of_generated_images_are_counted_by_contrasts() -> None:
    """Sixteen prompts, four noisings of four parts; a contrast of DPO has two images a prompt, one of NFT all six."""
    generation = ["prompts_per_contrast=4", "noisings=4", "images=6"]
    settings = [*(f"method.generation.{each}" for each in generation), "train.batch_size=16"]
    settings.append("train.gradient_accumulation_steps=4")
    for name, pairs in (("diffusion_online_dpo", 4), ("nft", 12)):
        recipe = load_recipe(f"text_to_image/{name}_tiny_sd", settings)
        needs = requirements_of(recipe.method)
        assert needs.contrasts(16) == (16, pairs, 2) and needs.contrasts(3) == (4, 3 * pairs // 4, 2)
        assert pairs_per_update(recipe.train, needs, 2) == 2 * 4 * pairs
        lines = describe_updates(recipe.train, needs, 1600, 1)
        assert (
            "a batch of 16 gives up to 16 contrasts; update: 1 process x 4 contrasts; an epoch has 400 updates" in lines
        )
