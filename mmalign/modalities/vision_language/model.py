"""The model of a vision-language recipe."""

from __future__ import annotations

from pathlib import Path

from mmalign.config import Model
from mmalign.families import loading
from mmalign.families.base import VisionLanguage
from mmalign.families.types import Loading
from mmalign.modalities.prompts import located
from mmalign.resources import resolve_model


def check_model(model: Model) -> None:
    """Check the model's path and type, perhaps with a query to the Hub.

    Raises:
        ValueError: the path is not found, or the type is not supported.
    """
    loading.model_type(located("model.path", model.path), model.revision)


def load_family(model: Model, options: Loading) -> VisionLanguage:
    """Load the model, frozen.

    Raises:
        ValueError: the model cannot be loaded.
    """
    return loading.load_vision_language(resolve_model(model.path), options)


def loading_hint(tune: str, folder: Path, form: str) -> str:
    """Return the call that loads a trained model in other programs."""
    return (
        f'PeftModel.from_pretrained(base_model, "{folder}")'
        if tune == "lora" and form != "merged"
        else f'AutoModelForImageTextToText.from_pretrained("{folder}")'
    )
