"""Selection of a checkpoint's adapter, and loading."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.config import ImageSize
from mmalign.families.base import PromptProcessor, TextToImage, VisionLanguage
from mmalign.families.types import Loading
from mmalign.reading import first_line, read_json
from mmalign.registry import import_callable

# The pipeline class in a folder's model_index.json, and the file in diffusion/ that adapts it.
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux_kontext",
    "Flux2Pipeline": "flux2",
    "ZImagePipeline": "z_image",
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
    "SanaPipeline": "sana",
}


_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that may be missing


def recognize(path: str, revision: str | None = None) -> tuple[str, str]:
    """Return a checkpoint's modality, and its pipeline class or its type of transformers, without loading any weights.

    Raises:
        ValueError: the path is no checkpoint, or one that is not supported.
    """
    readers = {"model_index.json": ("text_to_image", pipeline_class), "config.json": ("vision_language", model_type)}
    for name, (modality, read) in readers.items():
        try:
            _index_file(path, revision, name)
        except ValueError:
            continue
        return modality, read(path, revision)
    raise ValueError(
        f"model.path: {path} has no {' nor '.join(readers)} within reach; expected a folder of a diffusers pipeline or "
        "of a vision-language model of transformers, or a Hub id and a connection"
    )


def default_side(path: str, revision: str | None = None) -> int | None:
    """Return the side of a pipeline's images in pixels by its configurations; None if they do not say.

    Raises:
        ValueError: the configuration of the autoencoder is damaged.
    """
    for part in ("unet", "transformer"):
        try:
            files = [_index_file(path, revision, f"{name}/config.json") for name in (part, "vae")]
        except ValueError:
            continue
        denoiser, vae = (_read_dictionary(file, "a configuration") for file in files)
        # The denoiser's side is in latents; all blocks of the autoencoder but one halve it
        side, blocks = denoiser.get("sample_size"), vae.get("block_out_channels")
        if isinstance(side, int) and isinstance(blocks, list):
            return int(side * 2 ** (len(blocks) - 1))
    return None


def pipeline_class(path: str, revision: str | None = None) -> str:
    """Return the class that a checkpoint's model_index.json names, without loading any weights.

    Raises:
        ValueError: the checkpoint is not a diffusers pipeline, a part is missing, or the class is not supported.
    """
    # Class name
    index = _read_index(_index_file(path, revision), "_class_name", "the index of a diffusers pipeline")
    name: str = index["_class_name"]
    if name not in PIPELINES:
        raise ValueError(f"model.path: {path} is a {name}; supported are {', '.join(PIPELINES)}")
    # Folders of all parts
    parts = [part for part, of in index.items() if isinstance(of, list) and of and of[0] and part not in _UNUSED]
    lacking = [part for part in parts if Path(path).is_dir() and not any(Path(path, part).glob("*"))]
    if lacking:
        raise ValueError(f"model.path: {path} has no {', no '.join(lacking)}; copy it again, with all its folders")
    return name


def model_type(path: str, revision: str | None = None) -> str:
    """Return the type that a vision-language checkpoint's config.json names, without loading any weights.

    Raises:
        ValueError: the path is not a transformers checkpoint, or its type has no vision tower.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    file = _index_file(path, revision, "config.json", "a vision-language model of transformers")
    name: str = _read_index(file, "model_type", "the config of a model")["model_type"]
    if name not in KNOWN:
        raise ValueError(
            f"model.path: {path} is a {name}, which has no vision tower; expected a vision-language model, such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    return name


def _read_index(file: Path, key: str, kind: str) -> dict[str, Any]:
    """Read a dictionary of JSON with a text at `key`."""
    index = _read_dictionary(file, kind)
    if not isinstance(index.get(key), str):
        raise ValueError(f"model.path: {file} has no text {key!r}; expected {kind}; copy the model again")
    return index


def _read_dictionary(file: Path, kind: str) -> dict[str, Any]:
    remedy = f"expected {kind}; copy the model again"
    content = read_json(file, remedy, f"model.path: {file}")
    if not isinstance(content, dict):
        raise ValueError(f"model.path: {file} holds a {type(content).__name__} and no dictionary; {remedy}")
    return content


def _index_file(
    path: str, revision: str | None, name: str = "model_index.json", kind: str = "a diffusers pipeline"
) -> Path:
    folder = Path(path)
    if folder.exists():
        if not (folder / name).is_file():
            problem = f"has no {name}" if folder.is_dir() else "is a file"
            raise ValueError(f"model.path: {path} {problem}; expected the folder of {kind}, or a Hub id")
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except (OSError, EntryNotFoundError, ValueError) as error:
        raise ValueError(
            f"model.path: {path} is not a local folder, and its {name} did not come from the Hub "
            f"({first_line(error)}); check the name and your connection, or give a local folder"
        ) from error


def load_family(path: str, loading: Loading, outside: str | None = None) -> TextToImage:
    """Load a checkpoint with the adapter for its pipeline class, or with "module:function" from outside.

    Raises:
        ValueError: the class is not supported, a file is missing, or the function cannot be imported.
    """
    if outside is not None:
        family: TextToImage = import_callable("model.family", outside)(path, loading)
        return family
    kind = pipeline_class(loading.config or path, loading.revision)
    module = importlib.import_module(f"mmalign.families.diffusion.{PIPELINES[kind]}")
    family = module.load(path, loading)
    return family


def load_tokenizers(path: str, revision: str | None = None, outside: str | None = None) -> TextToImage:
    """Load a checkpoint's adapter without any network, to count the tokens of prompts.

    Raises:
        ValueError: the class is not supported, or a file is missing.
    """
    # Without a network the resolution is unknown; tokens do not depend on it
    options = Loading(torch.device("cpu"), revision=revision, size=ImageSize(512, 512), tokenizers_only=True)
    return load_family(path, options, outside)


def load_processor(
    path: str, revision: str | None = None, template_arguments: Mapping[str, object] | None = None
) -> PromptProcessor:
    """Load a vision-language checkpoint's tokenizer and image preprocessor, without its network.

    Raises:
        ValueError: the type is not supported, a file is missing, or the chat template has no such variable.
    """
    kind = model_type(path, revision)
    processor: PromptProcessor = importlib.import_module("mmalign.families.vlm.model").load_processor(
        path, kind, revision, template_arguments
    )
    return processor


def local_folder(name: str, revision: str | None = None) -> str | None:
    """Return the folder of a model that needs no download: a path, or a Hub id in the local cache; else None."""
    if Path(name).exists():
        return name if Path(name).is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def load_vision_language(path: str, loading: Loading, outside: str | None = None) -> VisionLanguage:
    """Load a vision-language checkpoint with the one adapter for all types of transformers, or with one from outside.

    Raises:
        ValueError: the type is not supported, the processor belongs to another model, a file is missing, or the
            function cannot be imported.
    """
    if outside is not None:
        family: VisionLanguage = import_callable("model.family", outside)(path, loading)
        return family
    kind = model_type(path, loading.revision)
    family = importlib.import_module("mmalign.families.vlm.model").load(path, kind, loading)
    return family
