"""The model of a text-to-image recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmalign.config import ImageModel, Model
from mmalign.families import loading
from mmalign.families.base import TextToImage
from mmalign.families.types import Loading
from mmalign.modalities.loading import DTYPES
from mmalign.modalities.prompts import located
from mmalign.resources import resolve_model


def check_model(model: Model) -> None:
    """Check the model's paths and the class of its pipeline, perhaps with a query to the Hub.

    Raises:
        ValueError: a path is not found, or no adapter knows the class.
    """
    assert isinstance(model, ImageModel)
    path = located("model.path", model.path)
    if model.vae is not None:
        located("model.vae", model.vae)
    loading.pipeline_class(path, model.revision)


def load_family(model: Model, options: Loading) -> TextToImage:
    """Load the pipeline, frozen.

    Raises:
        ValueError: the pipeline cannot be loaded.
    """
    assert isinstance(model, ImageModel)
    vae = resolve_model(model.vae) if model.vae is not None else None
    return loading.load_family(resolve_model(model.path), replace(options, vae=vae, vae_dtype=DTYPES[model.vae_dtype]))


def loading_hint(tune: str, folder: Path, form: str) -> str:
    """Return the call that loads a trained model in other programs."""
    if form in ("kohya", "comfyui"):
        return f"a LoRA loader of ComfyUI, after copying {folder / 'lora.safetensors'} to ComfyUI/models/loras"
    if form == "peft":
        return f'PeftModel.from_pretrained(denoiser, "{folder}")'
    return (
        f'pipeline.load_lora_weights("{folder}")'
        if tune == "lora" and form != "merged"
        else f'DiffusionPipeline.from_pretrained("{folder}")'
    )
