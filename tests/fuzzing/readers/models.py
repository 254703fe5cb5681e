"""Indices, configs and weights of model folders."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from hypothesis import strategies as st

from mmalign.families.diffusion.pipeline import _load_vae
from mmalign.families.loading import load_vision_language, model_type, pipeline_class
from mmalign.families.types import Loading
from tests.fuzzing.mutations import VALUES, Files
from tests.fuzzing.rule import Reader

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
PARTS = {"unet/config.json": b"{}", "vae/config.json": b"{}"}
CONFIG = {"model_type": "llava", "text_config": {"model_type": "llama"}}


LOADING = Loading(torch.device("cpu"))


class Written(Files):
    """Files of a model that a function writes into a folder, at the first look at them."""

    def __init__(self, write: Callable[[Path], object]) -> None:
        self.write = write

    @cached_property
    def content(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as name:
            self.write(Path(name))
            return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}

    def __getitem__(self, name: str) -> bytes:
        return self.content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def autoencoder(folder: Path) -> None:
    from tests.helpers import diffusion_models

    diffusion_models.autoencoder().save_pretrained(folder, max_shard_size="20KB")


def decoder(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from tests.helpers import vlm_models

    vlm_models.write("llava", folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")


def read(folder: Path) -> None:
    pipeline_class(str(folder))


READERS = (
    Reader(
        "model_index.json",
        read,
        ({"model_index.json": json.dumps(INDEX).encode(), **PARTS},),
        share=50,
        places=("model.path",),
        generated=VALUES.map(lambda value: {"model_index.json": json.dumps(value).encode(), **PARTS}),
    ),
    Reader(
        "config.json",
        lambda folder: model_type(str(folder)),
        ({"config.json": json.dumps(CONFIG).encode()},),
        share=30,
        places=("model.path",),
        generated=st.one_of(VALUES, st.dictionaries(st.just("model_type"), VALUES)).map(
            lambda value: {"config.json": json.dumps(value).encode()}
        ),
    ),
    Reader(
        "weights of diffusers, sharded",
        lambda folder: _load_vae(str(folder), LOADING),
        (Written(autoencoder),),
        share=10,
        places=("model.vae",),
    ),
    Reader(
        "weights of transformers, sharded",
        lambda folder: load_vision_language(str(folder), LOADING),
        (Written(decoder),),
        share=5,
        places=("model.path",),
    ),
)
