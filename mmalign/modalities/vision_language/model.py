"""The model of a vision-language recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from mmalign.config import Model, ResponseData, ResponseModel
from mmalign.data.caches import fingerprint
from mmalign.families import loading
from mmalign.families.base import PromptProcessor, VisionLanguage
from mmalign.families.stored import check_variant
from mmalign.families.types import Loading
from mmalign.language.chat import IMAGE, Turn
from mmalign.modalities.loading import disable_progress_bars, find_local
from mmalign.registry import import_callable
from mmalign.resources import located, resolve_model


def check_model(model: Model) -> None:
    """Check the model's path and type, perhaps with a query to the Hub.

    Raises:
        ValueError: the path is not found, or the type is not supported.
    """
    path = located("model.path", model.path)
    if model.adapter is not None:
        located("model.adapter.path", model.adapter.path)
    check_variant(path, model.variant)
    if model.family is None:
        loading.model_type(path, model.revision)
    else:
        import_callable("model.family", model.family)


def load_family(model: Model, options: Loading) -> VisionLanguage:
    """Load the model, frozen.

    Raises:
        ValueError: the model cannot be loaded.
    """
    assert isinstance(model, ResponseModel)
    options = replace(options, template_arguments=model.template_arguments)
    return loading.load_vision_language(resolve_model(model.path), options, model.family)


def load_local_processor(model: ResponseModel) -> PromptProcessor:
    """Load the tokenizer and image preprocessor that the model is trained with.

    Raises:
        ValueError: they are not on this machine.
    """
    disable_progress_bars()
    folder = find_local(model.path, model.revision)
    return loading.load_processor(folder, model.revision, model.template_arguments)


def token_limit(processor: PromptProcessor, data: ResponseData) -> int:
    """Return the most tokens of a row: the model's limit, or a lower one of the recipe."""
    return min(processor.max_length, data.max_length or processor.max_length)


def template_arguments(model: Model) -> dict[str, str]:
    """Return the variables of the chat template that a recipe sets, by key."""
    assert isinstance(model, ResponseModel)
    return {f"model.template_arguments.{name}": str(value) for name, value in model.template_arguments.items()}


def prompt_dependencies(model: Model, family: VisionLanguage) -> dict[str, str]:
    """Return the variables of the chat template, and a fingerprint of the tokens of a prompt with an image.

    It changes with the template, the tokenizer and the number of an image's tokens.
    """
    processor = family.processor
    view = processor.preprocess_image(Image.new("RGB", (640, 480), "gray"))
    row = processor.tokenize_prompt([Turn("user", f"{IMAGE}What is in the image?")], [("an image", view)])
    return {**template_arguments(model), "prompts": fingerprint.fingerprint_settings({"ids": row.ids})}


def loading_hint(tune: str, folder: Path, form: str) -> str:
    """Return the call that loads a trained model in other programs."""
    return (
        f'PeftModel.from_pretrained(base_model, "{folder}")'
        if tune == "lora" and form != "merged"
        else f'AutoModelForImageTextToText.from_pretrained("{folder}")'
    )
