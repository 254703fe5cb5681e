"""Files of a model that are damaged, gone, or something else."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import UNET, VAE, Commands, Content, contains, damage


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
