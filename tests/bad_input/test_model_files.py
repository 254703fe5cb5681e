"""Files of a model that are damaged, gone, or something else."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmalign.families.lora import PEFT_ADAPTERS
from mmalign.families.types import LoraSettings
from tests.conftest import Folders
from tests.helpers.commands import UNET, VAE, Commands, Content, contains, damage
from tests.helpers.loading import load_diffusion, load_vlm


@pytest.mark.parametrize(
    "how",
    [
        {"file": UNET, "keep": 0},
        {"file": UNET, "keep": 5000},
        {"file": UNET, "drop": "conv_in.weight"},
        {"file": UNET, "shape": "conv_in.weight"},
        {"file": VAE, "keep": 5000},
        {"file": VAE, "drop": "encoder.conv_in.weight"},
        {"file": "text_encoder/model.safetensors", "keep": 5000},
        {"file": "text_encoder/model.safetensors", "drop": "encoder.layers.0.mlp.fc1.weight"},
        {"file": "unet/config.json", "keep": 10},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_damaged_weights(how: dict[str, Any], mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(content["model"]["path"], model)
    damage(model, **how)
    message = mmalign.refused("train", content, f"model.path={model}")
    contains(message, f"model.path: {model} could not be loaded as a StableDiffusionPipeline (", "copy it again")


def test_weights_that_are_gone(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(content["model"]["path"], model)
    (model / UNET).unlink()
    contains(mmalign.refused("train", content, f"model.path={model}"), f"model.path: {model} could not be", "no file")


def test_another_autoencoder_that_is_none(mmalign: Commands, content: Content) -> None:
    whole = content["model"]["path"]
    message = mmalign.refused("train", content, f"model.vae={whole}")
    contains(message, f"model.vae: {whole} could not be loaded as an AutoencoderKL")
    message = mmalign.refused("train", content, "model.vae=someone/vae")
    contains(message, "model.vae: someone/vae could not", "check the name and your connection")


def test_adapters_for_layers_that_are_not_there(mmalign: Commands, content: Content) -> None:
    message = mmalign.refused("train", content, "model.tune=lora", "model.lora.targets=[to_x]")
    contains(message, "model.lora.targets: no layer of UNet2DConditionModel ends in to_x")


def without(file: Path, part: str) -> str:
    """Drop the first tensor of a file whose name has a part, and return its name."""
    weights = load_file(file)
    name = min(name for name in weights if part in name)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    return name


@pytest.mark.slow
def test_a_vision_language_model_without_a_weight(vlm_folders: Folders, tmp_path: Path) -> None:
    """Transformers would train and evaluate it with random numbers in the weight's place."""
    model, trained = tmp_path / "model", tmp_path / "trained"
    family = load_vlm(vlm_folders("llava"))
    trained.mkdir()
    family.save(trained, family.network)
    without(trained / "model.safetensors", "layers.1.")
    with pytest.raises(ValueError, match=r"its files lack 1 weights of a Llava.*layers\.1\..*`mmalign train` writes"):
        family.load_trained(trained)
    (trained / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        family.load_trained(trained)
    shutil.copytree(vlm_folders("llava"), model)
    without(model / "model.safetensors", "layers.1.")
    with pytest.raises(ValueError, match=r"model.path: .*its files lack 1 weights of a Llava.*copy it again"):
        load_vlm(model)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_adapters_without_one_of_their_matrices(
    half: str, vlm_folders: Folders, tiny_sd15: Path, tmp_path: Path
) -> None:
    """Diffusers and peft would initialize it."""
    loads: list[Callable[[], Any]] = [partial(load_vlm, vlm_folders("llava")), partial(load_diffusion, tiny_sd15)]
    for number, load in enumerate(loads):
        folder, family = tmp_path / str(number), load()
        folder.mkdir()
        family.add_lora(LoraSettings(2, 4.0, family.default_lora_targets, seed=0))
        family.save(folder, family.network)
        assert half in without(next(folder.glob("*.safetensors")), half)
        match = rf"lacks? .*{half}"
        with pytest.raises(ValueError, match=f"output: .*({match}).*`mmalign train` writes it again"):
            load().load_trained(folder)
        with pytest.raises(ValueError, match=f"model.adapter: .*({match}).*copy it again"):
            load().continue_adapter(str(folder))


def test_peft_adapters_of_a_denoiser_without_one_of_their_matrices(tiny_sd15: Path, tmp_path: Path) -> None:
    family = load_diffusion(tiny_sd15)
    family.add_lora(LoraSettings(2, 4.0, family.default_lora_targets, seed=0))
    family.export(tmp_path, family.network, "peft", None)
    without(tmp_path / PEFT_ADAPTERS, "lora_B")
    with pytest.raises(ValueError, match=r"model.adapter: .* lacks .*lora_B"):
        load_diffusion(tiny_sd15).continue_adapter(str(tmp_path))
