"""The model of a text-to-image recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmalign.config import ImageJudgeModel, ImageModel, JudgeModel, Model, Recipe
from mmalign.data.caches import fingerprint
from mmalign.data.formats.image_layouts import SOURCE
from mmalign.data.formats.images import Sources
from mmalign.families import loading
from mmalign.families.base import TextToImage
from mmalign.families.editing import EDITORS, not_editing
from mmalign.families.precision import warn_if_emulated
from mmalign.families.stored import check_variant
from mmalign.families.types import Loading
from mmalign.modalities.loading import DTYPES
from mmalign.registry import import_callable
from mmalign.resources import located, resolve_model


def check_model(model: Model) -> None:
    """Check the model's paths and the class of its pipeline, perhaps with a query to the Hub.

    Raises:
        ValueError: a path is not found, or no adapter knows the class.
    """
    assert isinstance(model, ImageModel)
    path, config = located("model.path", model.path), model.config
    if Path(path).is_file() and Path(path).suffix not in (".safetensors", ".ckpt"):
        raise ValueError(
            f"model.path: {path} is a file; expected the folder of a diffusers pipeline, a .safetensors file, or a "
            ".ckpt file with allow_pickle"
        )
    # A single file needs the configuration of a pipeline, and a pipeline has its own
    if Path(path).is_file() != (config is not None):
        problem = "is a single file" if config is None else "is no single file"
        remedy = "name a pipeline with the same layout as model.config, such as the model that it was fine-tuned from"
        raise ValueError(f"model.config: {path} {problem}; {remedy if config is None else 'leave model.config out'}")
    if model.adapter is not None:
        located("model.adapter.path", model.adapter.path)
    check_variant(path, model.variant)
    if model.vae is not None:
        located("model.vae", model.vae)
    # A class that an adapter knows, or a family from outside
    if model.family is None:
        loading.pipeline_class(path if config is None else located("model.config", config), model.revision)
    else:
        import_callable("model.family", model.family)


def source_use(recipe: Recipe) -> Sources | None:
    """Return whether the recipe's model needs source images beside its pairs, may have them, or ignores them.

    A family from outside has them if `data.columns` names them.

    Raises:
        ValueError: `data.columns` names source images, and the model does not edit images.
    """
    if isinstance(recipe.model, ImageJudgeModel):
        if SOURCE in recipe.data.columns:
            raise ValueError(f"data.columns: {SOURCE}: a judge of images sees no source images; leave the column out")
        return None
    is_named, path, kind = SOURCE in recipe.data.columns, pipeline_path(recipe.model), pipeline_class(recipe.model)
    editing = EDITORS.get(kind or "")
    if is_named and kind is not None and editing is None:
        raise ValueError(f"data.columns: {not_editing(path, kind)}")
    # A named column is needed; otherwise it depends on the model
    if is_named or editing is None:
        return "required" if is_named else None
    return editing.sources


def check_prompt_sources(key: str, model: Model, *, given: bool) -> None:
    """Check that a model edits the source images of prompts at `key`, if there are any, and has them if it needs them.

    Raises:
        ValueError: the model has no use for them, or needs them.
    """
    path, kind = pipeline_path(model), pipeline_class(model)
    if kind is None:
        return
    editing = EDITORS.get(kind)
    if given and editing is None:
        raise ValueError(f"{key}: {not_editing(path, kind)}")
    if not given and editing is not None and editing.sources == "required":
        raise ValueError(
            f"{key}: {path} is a {kind}, which edits a source image; expected a file of JSON lines such as "
            '{"prompt": "make the fox blue", "source": "images/3.png"}'
        )


def pipeline_class(model: Model) -> str | None:
    """Return the class of the recipe's pipeline; None for a family from outside, or if it is not at hand."""
    if isinstance(model, ImageModel) and model.family is not None:
        return None
    try:
        return loading.pipeline_class(resolve_model(pipeline_path(model)), model.revision)
    except ValueError:  # `check_model` says what is wrong with it
        return None


def pipeline_path(model: Model) -> str:
    """Return the path or Hub id of the pipeline's configuration."""
    return model.denoiser if isinstance(model, JudgeModel) else model.configurations[1]


def frozen_parts(family: TextToImage) -> dict[str, str]:
    """Return fingerprints of what frames the denoiser's work: text encoders, autoencoder and noise schedule."""
    encoders = {name.replace("_", " "): fingerprint.fingerprint_weights(net) for name, net in family.encoders()}
    return {**encoders, "noise schedule": fingerprint.fingerprint_schedule(family.schedule)}


def load_family(model: Model, options: Loading) -> TextToImage:
    """Load the pipeline, frozen.

    Raises:
        ValueError: the pipeline cannot be loaded.
    """
    assert isinstance(model, ImageModel)
    vae = resolve_model(model.vae) if model.vae is not None else None
    config = resolve_model(model.config) if model.config is not None else None
    warn_if_emulated("model.vae_dtype", model.vae_dtype, options.device)
    options = replace(options, vae=vae, vae_dtype=DTYPES[model.vae_dtype], config=config, offload=model.offload)
    return loading.load_family(resolve_model(model.path), options, model.family)


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
