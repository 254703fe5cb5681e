"""Fingerprints of weights, configs, tokenizers and schedules, used as cache keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.data.caches.array_cache import fingerprint_tensors
from mmalign.diffusion.noise import Schedule

TEMPLATE = "chat_template"  # how the files begin that lay a conversation out


# What a file says of how a part was loaded, or was called last, and not of what it does.
_PASSING = {
    "tokenizer.json": ("truncation", "padding"),
    "tokenizer_config.json": ("is_local", "local_files_only"),
}


def fingerprint_network(net: nn.Module) -> str:
    """Of every byte of a network's weights, and of the configuration that says what they compute."""
    return f"{fingerprint_tensors(net.state_dict())} {fingerprint_config(net)}"


def fingerprint_config(net: nn.Module) -> str:
    """Of a network's configuration, where transformers or diffusers gave it one, but for where it was loaded from."""
    config: Any = next((part.config for part in net.modules() if hasattr(part, "config")), {})
    return _hashed(_lasting(config.to_dict() if hasattr(config, "to_dict") else dict(config)))


def fingerprint_files(part: Any, *, template: bool = True) -> str:
    """Of a tokenizer or a processor: of all that it would be loaded from again, with its chat template or without."""
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return _hashed({name: _content(path) for name, path in files.items() if template or TEMPLATE not in name})


def fingerprint_schedule(schedule: Schedule) -> str:
    """Of a noise process: the levels of noise, and what the network predicts."""
    known: Any = schedule  # a dataclass, each of them
    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    values = {name: fingerprint_tensors({name: x}) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return _hashed({type(schedule).__name__: values})


def fingerprint_tokenizer(family: Any) -> str:
    """Of what makes tokens of prompts in a diffusers pipeline; of nothing where a family has none.

    And of the pipeline's own settings: SDXL's say whether no prompt is zeros or the words "".
    """
    pipeline = getattr(family, "pipeline", None)
    parts, told = getattr(pipeline, "components", {}), dict(getattr(pipeline, "config", {}))
    settings = {name: value for name, value in told.items() if name not in parts}
    files = {name: fingerprint_files(part) for name, part in parts.items() if "tokenizer" in name and part is not None}
    return _hashed({**files, "settings": _lasting(settings)})


def _content(path: Path) -> str:
    if path.name not in _PASSING:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    content = json.loads(path.read_text(encoding="utf-8"))
    return _hashed({name: value for name, value in content.items() if name not in _PASSING[path.name]})


def _lasting(value: Any) -> Any:
    """A configuration without its private entries and its library's version."""
    if isinstance(value, Mapping):
        entries = {str(name): x for name, x in value.items() if not str(name).startswith("_")}
        return {name: _lasting(x) for name, x in entries.items() if name != "transformers_version"}
    return [_lasting(x) for x in value] if isinstance(value, list | tuple) else value


def _hashed(about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(net: nn.Module) -> str:
    """Sixteen hex digits that tell networks apart: names, shapes, and a thousand values of every tensor.

    It is seen at once whether a run goes on from the model that it began with. What is kept on disk, and taken for what
    would be computed, must not miss a single number: `families.identity`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sampled)
    return digest.hexdigest()
