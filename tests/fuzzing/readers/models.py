"""Indices of model folders."""

import json
from pathlib import Path

from hypothesis import strategies as st

from mmalign.families.loading import model_type, pipeline_class
from tests.fuzzing.mutations import VALUES
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
)
