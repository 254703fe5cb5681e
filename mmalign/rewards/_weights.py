"""Weights of judges from single files, as their authors published them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign.resources import resolve_model
from mmalign.rewards import readable


def find_file(judge: str, path: str, name: str) -> Path:
    """Return a file of a folder or of a repository on the Hub, downloaded if need be; `path` may be the file itself.

    Raises:
        ValueError: there is no such file.
    """
    resolved = resolve_model(path)
    if Path(resolved).exists():
        file = Path(resolved) if Path(resolved).is_file() else Path(resolved) / name
        if not file.is_file():
            raise ValueError(f"reward {judge}: weights: {path} has no file {name!r}; expected a file of this folder")
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(resolved, name))
    except OSError as error:
        raise ValueError(
            f"reward {judge}: cannot download {name!r} of {path} ({' '.join(str(error).split())[:200]}); check both "
            "names and your connection, or give a local folder"
        ) from error


def find_optional(path: str, name: str) -> Path | None:
    """Return a file of a folder or of a repository on the Hub, downloaded if need be; None if there is none.

    Raises:
        ValueError: there is no such folder, and `path` is no Hub id.
    """
    resolved = Path(resolve_model(path))
    if resolved.exists():
        return resolved / name if (resolved / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(resolved), name))
    except EntryNotFoundError:  # also without a connection, where the local cache has no such file
        return None


def read_tensors(judge: str, file: Path, example: str, inner: str = "") -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file, or of a pickle that holds nothing else, perhaps in its entry `inner`.

    Messages have the judge's kind, and with `example` the beginning of a tensor's name.

    Raises:
        ValueError: the file is no such file.
    """
    with readable(judge, str(file), "copy it again"):
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    # Tensors may be in an entry of the pickle, but all values there must be tensors
    weights = content.get(inner) if inner and isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"reward {judge}: {file} holds no weights by name; expected tensors such as {example}...")
    return weights


def check_shapes(
    judge: str, file: Path, weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], remedy: str
) -> None:
    """Check that names and shapes of weights are the expected ones.

    Raises:
        ValueError: they are not; the message counts and names the differences and ends with `remedy`.
    """
    misshaped = [
        f"{name} {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": misshaped,
    }
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"reward {judge}: {file} does not fit: of the weights, {'; '.join(parts)}; {remedy}")
