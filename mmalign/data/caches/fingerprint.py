"""Fingerprints of weights, configs, tokenizers and schedules, used as cache keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.diffusion.noise import Schedule
from mmalign.families.types import PromptInputs, SavesFiles
from mmalign.reading import first_line
from mmalign.reading.weights import plain_tensors
from mmalign.registry import is_outside, source_file
from mmalign.resources import locate

TEMPLATE = "chat_template"  # common part of the names of chat template files
_CALLING = ("batch_size", "timeout", "retries", "wait")  # options of a judge's calls, not of its scores

# Entries that record how a part was loaded or last called. They do not affect its results.
_PASSING = {"tokenizer.json": ("truncation", "padding"), "tokenizer_config.json": ("is_local", "local_files_only")}


def fingerprint_weights(net: nn.Module) -> str:
    """Return a fingerprint of a network's weights, the same in every precision that holds them exactly."""
    return fingerprint_tensors(net.state_dict())


def fingerprint_tensors(state: Mapping[str, Tensor]) -> str:
    """Return 32 hex digits that identify tensors: names, shapes and every number; half precision counts as float32."""
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:
        for name, content in zip(sorted(state), pool.map(_hash_numbers, map(state.get, sorted(state))), strict=True):
            digest.update(f"{len(name)} {name} {tuple(state[name].shape)} {content}\n".encode())
    return digest.hexdigest()


def _hash_numbers(tensor: Tensor) -> str:
    inner = plain_tensors(tensor)
    if inner[0] is not tensor:  # quantized
        return " ".join(map(_hash_numbers, inner))
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {hashlib.sha256(numbers).hexdigest()}"  # on many CPUs twice as fast as blake2b


def fingerprint_network(net: nn.Module) -> str:
    """Return a fingerprint of a network's weights, of their precision and of its configuration."""
    state = net.state_dict()
    dtypes = " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    return f"{fingerprint_tensors(state)} {dtypes} {fingerprint_config(net)}"


def fingerprint_config(net: nn.Module) -> str:
    """Return a fingerprint of a network's transformers or diffusers configuration, without its load path."""
    config: Any = next((part.config for part in net.modules() if hasattr(part, "config")), {})
    # diffusers' configurations are mappings, transformers' are not
    return fingerprint_settings(_lasting(config if isinstance(config, Mapping) else config.to_dict()))


def fingerprint_files(part: SavesFiles, *, template: bool = True) -> str:
    """Return a fingerprint of all files that a tokenizer or processor saves; `template` includes its chat template."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            part.save_pretrained(folder)
        except Exception as error:  # for a full disk the library tokenizers raises Exception itself
            raise ValueError(
                f"{tempfile.gettempdir()}: a tokenizer could not be written there ({first_line(error)}); free some "
                "space, or set TMPDIR to another folder"
            ) from error
        # Contents by name; the folder has another name in every call
        files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return fingerprint_settings(
            {name: _content(path) for name, path in files.items() if template or TEMPLATE not in name}
        )


def fingerprint_folder(path: str) -> str:
    """Return a fingerprint of the weights in a local file or folder, with their scale, or of the name of a Hub id."""
    place = Path(path)
    # The configuration of an adapter has its alpha, without which its weights say nothing
    inside = (file for pattern in ("*.safetensors", "adapter_config.json") for file in sorted(place.glob(pattern)))
    files = [place] if place.is_file() else list(inside)
    return fingerprint_settings({file.name: _content(file) for file in files} or {"name": path})


def fingerprint_judge(name: str, path: str, options: Mapping[str, object], *, runs_path: bool = False) -> str | None:
    """Return a fingerprint of a judge: its kind, its options, and the content of the files or modules that it names.

    Of the project's own judges, options such as `batch_size`, which do not change scores, do not count.
    A Hub id, an address or an architecture counts by its name. Modules that a named module imports do not count.

    Returns:
        The fingerprint, or None if the code of a function is in no file.
    """
    files = [source_file(code) for code in (name, path if runs_path else "") if is_outside(code)]
    if None in files:
        return None
    named = [locate(text) for text in (path, *options.values()) if isinstance(text, str) and text]
    for place in (Path(name) for name in named if os.path.exists(name)):  # Path.exists fails for a long question
        files += [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    contents = {str(file): _content(file) for file in files if file is not None}
    lasting = {key: value for key, value in options.items() if is_outside(name) or key not in _CALLING}
    return fingerprint_settings({"name": name, "path": path, "options": lasting, "files": contents})


def fingerprint_schedule(schedule: Schedule) -> str:
    """Return a fingerprint of a noise schedule: its noise levels and the network's prediction type."""
    known: Any = schedule  # every schedule is a dataclass
    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known) if field.compare}
    values = {name: fingerprint_tensors({name: x}) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return fingerprint_settings({type(schedule).__name__: values})


def fingerprint_prompt_inputs(inputs: PromptInputs) -> str:
    """Return a fingerprint of the tokenizers and settings by which a model encodes prompts."""
    files = {name: fingerprint_files(part) for name, part in inputs.tokenizers.items()}
    return fingerprint_settings({**files, "settings": _lasting(inputs.settings)})


def _content(path: Path) -> str:
    if path.name not in _PASSING:
        with path.open("rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    content = json.loads(path.read_text(encoding="utf-8"))
    return fingerprint_settings({name: value for name, value in content.items() if name not in _PASSING[path.name]})


def _lasting(config: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration without its private entries and the library version."""

    def cleaned(value: object) -> object:
        if isinstance(value, Mapping):
            return _lasting(value)
        return [cleaned(x) for x in value] if isinstance(value, list | tuple) else value

    entries = {str(name): cleaned(value) for name, value in config.items()}
    return {name: x for name, x in entries.items() if not name.startswith("_") and name != "transformers_version"}


def fingerprint_settings(settings: Mapping[str, object]) -> str:
    """Return 16 hex digits that identify settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
