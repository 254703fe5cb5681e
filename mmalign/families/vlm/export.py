"""Trained vision-language models in the forms of other programs, each read back by its reader and compared.

A full model is a copy of the base model's files in which only the weights are new.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.families.lora import (
    TRAINED,
    absorb_adapters,
    adapter_layers,
    check_adapter_path,
    check_exportable,
    check_peft,
    in_float32,
    merged_weights,
    save_peft,
)
from mmalign.families.stored import (
    cast,
    compare_weights,
    copy_files,
    restore_dtypes,
    source_folder,
    state_dtype,
    stored_dtypes,
)
from mmalign.language.tokens import forget_padding
from mmalign.reading.weights import every_tensor, intact, one_sentence, tensors_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmalign.families.vlm.model import ImageTextToText


def export(base: ImageTextToText, model: PreTrainedModel, folder: Path, form: str, dtype: torch.dtype | None) -> None:
    """Write a trained model of a base model in a form, read it back and compare it (`Family.export`)."""
    if form not in ("peft", "merged"):
        raise ValueError(f"{form} has no vision-language models; use peft or merged")
    if form == "merged":
        _check_model(folder, save_model(base, model, folder, dtype))
    else:
        check_exportable(model, base.loading.adapter, "merged")
        save_adapters(base, model, folder, dtype)
        check_peft(model, folder, dtype)
    _check_processor(folder)


def save_adapters(
    base: ImageTextToText, model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters for peft, with the processor and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = base.processor.processor
    forget_padding(processor)
    processor.save_pretrained(folder)
    save_peft(model, folder, base.name, base.loading.revision, dtype)


def save_model(
    base: ImageTextToText, model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None
) -> Mapping[str, Tensor]:
    """Write a model's folder: the base model's files byte for byte, and the weights in its files' dtypes.

    Returns:
        The weights before rounding, with adapters merged.

    Raises:
        ValueError: the base model's files are no longer there.
    """
    loading, source = base.loading, source_folder(base.name, base.loading.revision)
    stored = stored_dtypes(source, loading.variant)
    # Trained weights; adapters are merged into weights that are read again, since the run's own may be rounded
    weights: Mapping[str, Tensor] = model.state_dict()
    if adapter_layers(model):
        plain = _load(source, stored.loading, stored.variant, loading.allow_pickle)
        if loading.adapter is not None:
            read_adapter(plain, loading.adapter)
            absorb_adapters(plain)
        weights = merged_weights(model, plain)
    # Saved by a model of the plain class that takes these weights as they are
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    bare.load_state_dict(cast(weights, dtype or stored.loading), assign=True)
    bare.tie_weights()
    bare.save_pretrained(folder)
    # Files in the base model's dtypes, beside its own configuration
    if dtype is None:
        restore_dtypes(folder, stored)
    copy_files(source, folder, weights=False)
    if dtype is not None:
        state_dtype(folder / "config.json", dtype)
    return weights


def read_adapter(model: PreTrainedModel, path: str) -> None:
    """Add existing adapters of peft to a model: a folder or a Hub id.

    Raises:
        ValueError: they cannot be read, or are another model's.
    """
    check_adapter_path(path)
    kind = f"adapters of a {type(model).__name__}"
    with intact("model.adapter", path, kind), tensors_only(), every_tensor(), in_float32():
        model.load_adapter(path, adapter_name=TRAINED)
    if not adapter_layers(model):
        raise ValueError(f"model.adapter: {path} adapts no layer of this model; expected an adapter of this model")


def adapter_names(path: str) -> list[str]:
    """Return the names of the weights of existing adapters of peft: a folder or a Hub id.

    Raises:
        ValueError: they cannot be read.
    """
    from peft.utils import load_peft_weights

    check_adapter_path(path)
    with intact("model.adapter", path, "adapters of peft"), tensors_only():
        return list(load_peft_weights(path, device="cpu"))


def _load(
    folder: Path, dtype: torch.dtype, variant: str | None = None, allow_pickle: bool | None = None
) -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText

    options = {"dtype": dtype, "variant": variant, "trust_remote_code": False}
    with tensors_only(allow_pickle):
        return AutoModelForImageTextToText.from_pretrained(folder, **options)


def _check_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Load the folder by transformers and compare the weights."""
    stored = stored_dtypes(folder)
    with one_sentence("transformers cannot read back what was written", folder, "copy the model again"):
        loaded = _load(folder, stored.loading)
    compare_weights(weights, loaded, stored)


def _check_processor(folder: Path) -> None:
    """Load the processor from the folder."""
    from transformers import AutoProcessor

    with one_sentence("transformers cannot read the processor back", folder, "copy the model again"), tensors_only():
        AutoProcessor.from_pretrained(folder, trust_remote_code=False)
