"""Trained diffusion models in the forms of other programs, each read back by its reader and compared.

A full pipeline is a copy of the base model's files in which only the denoiser's weights are new.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign.families.diffusion import lora_names
from mmalign.families.diffusion.adapter import merge_adapter
from mmalign.families.diffusion.lora_files import load_lora
from mmalign.families.diffusion.single_file import load_single_file
from mmalign.families.diffusion.sizes import denoiser_name
from mmalign.families.lora import (
    ADAPTERS,
    LOADED,
    adapter_layers,
    check_exportable,
    check_peft,
    compare_adapters,
    folded,
    in_float32,
    merged_weights,
    save_lora,
    save_peft,
)
from mmalign.families.stored import cast, compare_weights, copy_files, restore_dtypes, source_folder, stored_dtypes
from mmalign.reading.weights import one_sentence, tensors_only

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from mmalign.families.diffusion.pipeline import LatentModel

INDEX = "model_index.json"
FILE = "lora.safetensors"  # of kohya's and ComfyUI's names
NAMES = {"kohya": lora_names.kohya, "comfyui": lora_names.comfyui}


def export(base: LatentModel, net: ModelMixin, folder: Path, form: str, dtype: torch.dtype | None) -> None:
    """Write a trained denoiser of a base model in a form, read it back and compare it (`Family.export`)."""
    pipeline, part = base.pipeline, denoiser_name(base.pipeline)
    # Whole pipelines
    if form == "merged" or (form == "diffusers" and not adapter_layers(net)):
        return _check_pipeline(pipeline, part, folder, save_pipeline(base, net, folder, dtype))
    # Adapters alone
    check_exportable(net, base.loading.adapter, "merged or diffusers")
    if form == "peft":
        save_peft(net, folder, base.name, base.loading.revision, dtype)
        return check_peft(net, folder, dtype)
    file = ADAPTERS
    if form == "diffusers":
        save_lora(type(pipeline), part, net, folder, dtype)
    else:
        # A file with another program's names, which diffusers' converters read back
        file = FILE
        weights = NAMES[form](type(pipeline).__name__, _pairs(net, dtype), net)
        save_file(weights, folder / file, {"format": "pt"})
    _check_lora(pipeline, part, net, folder, file, dtype)


def _pairs(net: ModelMixin, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both matrices of every adapted layer, the scale folded.

    Raises:
        ValueError: the adapters have DoRA's magnitudes. sd-scripts and diffusers drop them in these forms; ComfyUI and
            Automatic1111 divide them by norms of columns, of the bare weight's rows or of the sum's, by version.
    """
    weights, config = folded(net, dtype)
    if config.get("use_dora"):
        raise ValueError(
            "sd-scripts drops DoRA's magnitudes, and versions of ComfyUI and Automatic1111 apply them in different "
            "ways; use merged, or peft or diffusers"
        )
    return {
        layer: (weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]) for layer in adapter_layers(net)
    }


def _check_lora(
    pipeline: DiffusionPipeline, part: str, net: ModelMixin, folder: Path, file: str, dtype: torch.dtype | None
) -> None:
    """Load a file by the pipeline's own reader, beside the trained adapters, and compare them."""
    pipeline = copy.copy(pipeline)
    setattr(pipeline, part, net)
    problem = f"{type(pipeline).__name__} cannot read back what was written"
    with one_sentence(problem, folder, "use another form"), in_float32():
        load_lora(pipeline, net, str(folder), file=file, adapter=LOADED)
    compare_adapters(net, dtype)


def save_pipeline(
    base: LatentModel, net: ModelMixin, folder: Path, dtype: torch.dtype | None = None
) -> Mapping[str, Tensor]:
    """Write a pipeline's folder: the base model's files byte for byte, and the denoiser in its files' dtypes.

    Returns:
        The denoiser's weights before rounding, with adapters merged.

    Raises:
        ValueError: the base model's files are no longer there.
    """
    loading, part = base.loading, denoiser_name(base.pipeline)
    if loading.config is not None:
        return _save_single_file(base, net, folder, loading.config, dtype)
    # Frozen parts, from the base model's files
    source = source_folder(base.name, loading.revision)
    vae = source_folder(loading.vae, None) if loading.vae else None
    _copy_frozen(source, folder, part, vae, loading.variant)
    stored = stored_dtypes(source / part, loading.variant)
    # Trained weights; adapters are merged into weights that are read again, since the run's own may be rounded
    plain = net
    if adapter_layers(net):
        plain = _load_part(type(net), source / part, stored.loading, stored.variant, loading.allow_pickle)
    weights = _merged_into(base, net, plain)
    # Saved by a network of the plain class that takes these weights as they are
    with torch.device("meta"):
        bare = type(net).from_config(net.config)
    bare.load_state_dict(cast(weights, dtype or stored.loading), assign=True)
    bare.save_pretrained(folder / part)
    # Files in the base model's dtypes, beside its own configuration
    if dtype is None:
        restore_dtypes(folder / part, stored)
    copy_files(source / part, folder / part, weights=False)
    return weights


def _save_single_file(
    base: LatentModel, net: ModelMixin, folder: Path, config: str, dtype: torch.dtype | None
) -> Mapping[str, Tensor]:
    """Write the pipeline of a single file, read again in its own dtype, with the trained denoiser."""
    pipeline, loading, part = base.pipeline, base.loading, denoiser_name(base.pipeline)
    stored = stored_dtypes(Path(base.name))
    with tensors_only(loading.allow_pickle):
        # Parts that the pipeline lacks need an explicit None
        options: dict[str, Any] = {key: None for key, x in pipeline.components.items() if x is None}
        options |= {"revision": loading.revision, "variant": loading.variant}
        whole = load_single_file(type(pipeline), part, base.name, config, stored.other, options)
    plain = getattr(whole, part)
    weights = _merged_into(base, net, plain)
    plain.load_state_dict(cast(weights, dtype or stored.other), assign=True)
    whole.save_pretrained(folder)
    # An autoencoder in place of the file's, byte for byte
    if loading.vae is not None:
        shutil.rmtree(folder / "vae")
        copy_files(source_folder(loading.vae, None), folder / "vae", weights=True)
    return weights


def _merged_into(base: LatentModel, net: ModelMixin, plain: ModelMixin) -> Mapping[str, Tensor]:
    """Return the weights of `net`; its adapters and those it began with are added to the base model's, `plain`."""
    if not adapter_layers(net):
        weights: Mapping[str, Tensor] = net.state_dict()
        return weights
    if base.loading.adapter is not None:
        merge_adapter(base.pipeline, plain, base.loading.adapter)
    return merged_weights(net, plain)


def _copy_frozen(source: Path, folder: Path, part: str, vae: Path | None, variant: str | None) -> None:
    """Copy the index and all parts but the denoiser; the index leaves out parts that have no files."""
    text = (source / INDEX).read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(text)
    parts = [key for key, kind in index.items() if isinstance(kind, list) and kind and kind[0]]
    # The index may name parts that have no folder
    absent = [key for key in parts if not (source / key).is_dir()]
    for key in parts:
        if key != part and key not in absent:
            place = vae if key == "vae" and vae is not None else source / key
            copy_files(place, folder / key, weights=True, variant=variant)
    if absent:
        text = json.dumps(index | {key: [None, None] for key in absent}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _load_part(
    kind: type[ModelMixin],
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None = None,
    allow_pickle: bool | None = None,
) -> ModelMixin:
    with tensors_only(allow_pickle):
        return kind.from_pretrained(folder, dtype=dtype, variant=variant)


def _check_pipeline(pipeline: DiffusionPipeline, part: str, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Load the folder by the pipeline's class, with the base model's frozen networks, and compare the denoiser."""
    stored = stored_dtypes(folder / part)
    loaded = _load_part(type(getattr(pipeline, part)), folder / part, stored.loading)
    frozen = {key: x for key, x in pipeline.components.items() if isinstance(x, nn.Module) and key != part}
    with one_sentence(f"{type(pipeline).__name__} cannot read back what was written", folder, "copy the model again"):
        type(pipeline).from_pretrained(folder, **{**frozen, part: loaded})
    compare_weights(weights, loaded, stored)
