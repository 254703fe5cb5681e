"""Files of a checkpoint as their authors stored them: copies of frozen parts, and the dtype of every weight.

A checkpoint is a folder of a diffusers pipeline or of a transformers model, local or in the Hub's cache.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.families.loading import local_folder

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = (*PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".xml")  # weights of other programs
TINY = 2**-24  # half of the smallest number in float16
_SHARD = re.compile(r"-\d+-of-\d+$")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def source_folder(path: str, revision: str | None) -> Path:
    """Return the local folder of a model that was loaded from a path or Hub id.

    Raises:
        ValueError: the folder was moved or deleted since.
    """
    folder = local_folder(path, revision)
    if folder is None:
        raise ValueError(f"model.path: {path} is no longer there; restore it, since exports copy its frozen parts")
    return Path(folder)


@dataclass(frozen=True)
class StoredDtypes:
    """Dtypes of a checkpoint's weights by name; `other` holds for weights that it does not name.

    `variant` is that of their files.
    """

    names: Mapping[str, torch.dtype]
    other: torch.dtype
    variant: str | None

    @property
    def loading(self) -> torch.dtype:
        """The dtype that loads every weight without loss: the one of all weights, or else float32."""
        return self.other if set(self.names.values()) <= {self.other} else torch.float32

    @property
    def eps(self) -> float:
        """The largest relative rounding error of a weight."""
        return max(torch.finfo(dtype).eps for dtype in {*self.names.values(), self.other})


def stored_dtypes(folder: Path, variant: str | None = None) -> StoredDtypes:
    """Read the dtypes of the weights in a file or in a folder's safetensors; float32 where there are only pickles.

    Without files of the variant, those without a variant count.
    """
    names, sizes = dict[str, torch.dtype](), dict[torch.dtype, int]()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    variant = variant if any(is_variant(file.name, variant) for file in files) else None
    for file in files:
        if file.suffix == ".safetensors" and (file == folder or is_variant(file.name, variant)):
            # Headers alone are read
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    if (dtype := _DTYPES.get(part.get_dtype())) is not None:
                        names[name] = dtype
                        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(part.get_shape()).numel()
    # The dtype of most numbers stands for names that are not in the files
    return StoredDtypes(names, max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32), variant)


def is_variant(name: str, variant: str | None) -> bool:
    """Return whether a weight file is of this variant; None is the variant without a name."""
    parts = (_SHARD.sub("", part) for part in name.split(".")[1:])
    named = [part for part in parts if f".{part}" not in (".safetensors", ".index", ".json", *_FOREIGN)]
    return named == ([variant] if variant else [])


def check_variant(path: str, variant: str | None) -> None:
    """Check that a local model's folder has weight files of the variant.

    Raises:
        ValueError: it has only others; the message names them.
    """
    for folder in (Path(path), Path(path, "unet"), Path(path, "transformer")):
        names = [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
        if names and not any(is_variant(name, variant) for name in names):
            # Parts of names between the first point and the suffix, such as fp16
            there = sorted({part for name in names for part in name.split(".")[1:-1]} - {"safetensors", "bin"})
            wanted = f"of the variant {variant}" if variant else "without a variant"
            remedy = f"set model.variant to {' or '.join(there) or 'null'}"
            raise ValueError(f"model.variant: {folder} has no weights {wanted}; {remedy}")


def copy_files(source: Path, target: Path, *, weights: bool, variant: str | None = None) -> None:
    """Copy the files directly in a folder, byte for byte, without README, hidden files and other programs' weights.

    A variant's weights, such as model.fp16.safetensors, get the name without it. Safetensors exclude other formats.

    Args:
        source: the folder.
        target: the folder to write, created if it is missing.
        weights: true to copy weights too.
        variant: the variant to copy; without files of its name, the weights without a variant.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    safe = any(path.suffix == ".safetensors" for path in files)
    is_weight = {path: path.suffix in (".safetensors", *_FOREIGN) or ".index." in path.name for path in files}
    if variant and not any(is_weight[path] and is_variant(path.name, variant) for path in files):
        variant = None
    for path in files:
        if path.name == "README.md":
            continue
        if not is_weight[path]:
            shutil.copyfile(path, target / path.name)
        elif weights and is_variant(path.name, variant) and not (safe and _is_foreign(path)):
            name = path.name.replace(f".{variant}", "")
            shutil.copyfile(path, target / name)
            if variant and path.suffix == ".json":  # an index names the files of its shards
                text = path.read_text(encoding="utf-8").replace(f".{variant}", "")
                (target / name).write_text(text, encoding="utf-8")


def _is_foreign(path: Path) -> bool:
    return path.suffix in _FOREIGN or any(f"{suffix}.index" in path.name for suffix in PICKLES)


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights on the CPU, the floating ones in a dtype."""
    return {
        name: x.detach().to("cpu", dtype if x.is_floating_point() else x.dtype).contiguous()
        for name, x in weights.items()
    }


def restore_dtypes(folder: Path, stored: StoredDtypes) -> None:
    """Give the weights in a folder's safetensors the dtypes of the checkpoint, if it has several."""
    if len(set(stored.names.values())) > 1:
        for file in folder.glob("*.safetensors"):
            tensors = {name: x.to(stored.names.get(name, x.dtype)) for name, x in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})


def compare_weights(expected: Mapping[str, Tensor], loaded: nn.Module, stored: StoredDtypes) -> None:
    """Compare the weights that a library read with those that were to be written, up to the rounding of their dtypes.

    Raises:
        ValueError: a weight is missing or differs.
    """
    read = loaded.state_dict()
    for name, weight in expected.items():
        if name not in read:
            raise ValueError(f"{name} was not read back")
        if not torch.allclose(read[name].float(), weight.float().cpu(), rtol=stored.eps, atol=TINY):
            raise ValueError(f"{name} was read back with other numbers")


def state_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the dtype of all weights into the config.json of a transformers model, wherever it states one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
