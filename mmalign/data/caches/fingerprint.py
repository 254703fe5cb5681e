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

TEMPLATE = "chat_template"  # common part of the names of chat template files


# Entries that record how a part was loaded or last called. They do not affect its results.
_PASSING = {
    "tokenizer.json": ("truncation", "padding"),
    "tokenizer_config.json": ("is_local", "local_files_only"),
}


def fingerprint_network(net: nn.Module) -> str:
    """Return a fingerprint of a network's configuration and of every byte of its weights."""
    return f"{fingerprint_tensors(net.state_dict())} {fingerprint_config(net)}"


def fingerprint_config(net: nn.Module) -> str:
    """Return a fingerprint of a network's transformers or diffusers configuration, without its load path."""
    config: Any = next((part.config for part in net.modules() if hasattr(part, "config")), {})
    return _hashed(_lasting(config.to_dict() if hasattr(config, "to_dict") else dict(config)))


def fingerprint_files(part: Any, *, template: bool = True) -> str:
    """Return a fingerprint of all files that a tokenizer or processor saves; `template` includes its chat template."""
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return _hashed({name: _content(path) for name, path in files.items() if template or TEMPLATE not in name})


def fingerprint_schedule(schedule: Schedule) -> str:
    """Return a fingerprint of a noise schedule: its noise levels and the network's prediction type."""
    known: Any = schedule  # every schedule is a dataclass
    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    values = {name: fingerprint_tensors({name: x}) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return _hashed({type(schedule).__name__: values})


def fingerprint_tokenizer(family: Any) -> str:
    """Return a fingerprint of a diffusers pipeline's tokenizers and settings; of nothing for a family without pipeline.

    Settings matter: SDXL's say whether the empty prompt is encoded as zeros or as the text "".
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
    """Return a configuration without its private entries and the library version."""
    if isinstance(value, Mapping):
        entries = {str(name): x for name, x in value.items() if not str(name).startswith("_")}
        return {name: _lasting(x) for name, x in entries.items() if name != "transformers_version"}
    return [_lasting(x) for x in value] if isinstance(value, list | tuple) else value


def _hashed(about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(net: nn.Module) -> str:
    """Return 16 hex digits of a network: names, shapes, and about a thousand values of every tensor.

    It is fast, and checks that a run resumes from the model that it started with. Cache keys must reflect every
    value: they use `fingerprint_network`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sampled)
    return digest.hexdigest()
