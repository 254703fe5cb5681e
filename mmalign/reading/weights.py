"""Loading of model files that others wrote: none of their code runs, and every error is a sentence that names the file.

Weights come from safetensors. A pickle (.bin, .pt, .pth, .ckpt) is refused, or with `allow_pickle` read by torch's
unpickler for tensors alone. Classes that a model's folder or repository brings are never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmalign.reading import first_line

_torch_load = torch.load
_CODE = ("it brings its own code, which mmalign never runs", "use a model of the library's own classes")
_CONVERT = "convert it to safetensors"
_ALLOW = ", or set allow_pickle: true in the recipe if you trust its author"


def plain_tensors(tensor: Any) -> list[Tensor]:
    """Return the tensors that hold the numbers: those inside of a quantized tensor, else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in plain_tensors(getattr(tensor, name))]


class RefusedFileError(ValueError):
    """File of a model that could run code when it is loaded, holds more than weights, or never ends.

    Args:
        reason: what the file is.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


@contextlib.contextmanager
def tensors_only(allow_pickle: bool | None = None) -> Iterator[None]:
    """Let the libraries load weights, and refuse pickles and code that a model brings.

    The libraries choose the files, so what they call is replaced while the context is open.

    Args:
        allow_pickle: True reads pickles too, of tensors alone; None refuses them where a recipe cannot allow them.

    Raises:
        RefusedFileError: (inside the context) a file is a pickle, holds more than tensors, or is code.
    """
    from transformers import dynamic_module_utils

    # Else transformers asks a bot to convert a model of the Hub, and loads weights from its pull request.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    refuse = partial(_refuse_pickle, _CONVERT if allow_pickle is None else _CONVERT + _ALLOW)
    replaced: dict[tuple[Any, str], object] = {
        (torch, "load"): _load_tensors if allow_pickle else refuse,
        (dynamic_module_utils, "get_class_in_module"): _refuse_code,
        (dynamic_module_utils, "TIME_OUT_REMOTE_CODE"): 0,  # never ask the user on the terminal
    }
    before = {place: getattr(*place) for place in replaced}
    try:
        for place, value in replaced.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


@contextlib.contextmanager
def every_tensor() -> Iterator[None]:
    """Refuse a model or adapter of transformers, also inside a pipeline, whose files lack weights.

    Else the library initializes them with random numbers and logs a warning.

    Raises:
        ValueError: (inside the context) weights are missing.
    """
    from transformers import modeling_utils
    from transformers.integrations import peft
    from transformers.utils.loading_report import log_state_dict_report

    def refuse_missing(model: Any, *args: Any, loading_info: Any, **options: Any) -> None:
        log_state_dict_report(model, *args, loading_info=loading_info, **options)
        if lacking := sorted(map(str, loading_info.missing_keys)):
            raise ValueError(
                f"its files lack {len(lacking):,} weights of a {type(model).__name__}, such as {lacking[0]}"
            )

    callers: tuple[Any, Any] = (modeling_utils, peft)
    for caller in callers:
        caller.log_state_dict_report = refuse_missing
    try:
        yield
    finally:
        for caller in callers:
            caller.log_state_dict_report = log_state_dict_report


def pickles_allowed() -> bool:
    """Return whether the innermost open `tensors_only` reads pickles too."""
    current: object = torch.load
    return current is _load_tensors


def use_safetensors(path: str | Path, allow_pickle: bool) -> bool | None:
    """Return the libraries' option: True downloads no pickle from the Hub; None takes what a folder has."""
    return None if allow_pickle or Path(path).exists() else True


@contextlib.contextmanager
def intact(key: str, path: str | Path, kind: str, mend: str | None = None) -> Iterator[None]:
    """Turn errors of loading into a sentence, as `one_sentence` does; `kind` is what the path should hold."""
    here = "it may be incomplete: copy it again"
    mend = mend or (here if Path(path).exists() else "check the name and your connection, or give a local folder")
    with one_sentence(f"{key}: {path} could not be loaded as {kind}", path, mend):
        _check_regular(Path(path))
        yield


def _check_regular(path: Path) -> None:
    """Refuse a folder with a device or a pipe, which a library would read for ever."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.exists() and not file.is_dir() and not file.is_file():
            raise RefusedFileError(f"{file.name} is a device or a pipe", "put a file in its place")


@contextlib.contextmanager
def one_sentence(problem: str, path: str | Path, mend: str) -> Iterator[None]:
    """Turn any error of a library that loads damaged, incomplete or refused files into a ValueError of one sentence.

    Args:
        problem: the beginning of the sentence.
        path: the files.
        mend: the end of the sentence, unless the error has its own remedy.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # For damaged files diffusers, transformers, open_clip and safetensors raise half a dozen kinds of error.
    except Exception as error:
        raise ValueError(f"{problem} {_explain(error, path, mend)}") from error


def _explain(error: BaseException, path: str | Path, mend: str) -> str:
    """Return "(reason); remedy" of an error of loading: the file that was refused or is damaged, else `mend`."""
    # A refused file, whatever error a library has made of it
    causes = list(_causes(error))
    refused = next((cause for cause in causes if isinstance(cause, RefusedFileError)), None)
    if refused is not None:
        return f"({refused.reason}); {refused.remedy}"
    # Messages of transformers and diffusers
    words = " ".join(map(str, causes))
    if "trust_remote_code" in words:
        return "({}); {}".format(*_CODE)
    if "use_safetensors" in words or "necessary `safetensors`" in words:
        return f"(it has no weights in safetensors); {_CONVERT}{_ALLOW}"
    damaged = _damaged_file(Path(path))
    return f"({f'{damaged} is damaged' if damaged else first_line(error)}); {mend}"


def sort_metadata(file: Path) -> None:
    """Sort the metadata in the header of a safetensors file; the library writes it in an order that changes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _damaged_file(folder: Path) -> str | None:
    """Return the first of a folder's safetensors whose header cannot be read."""
    for file in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(file, "pt"):
                pass
        except Exception:
            return str(file)
    return None


def _refuse_pickle(remedy: str, file: object, *_: object, **__: object) -> NoReturn:
    raise RefusedFileError(f"{_name(file)} is a pickle, which can run code", remedy)


def _refuse_code(*_: object, **__: object) -> NoReturn:
    raise RefusedFileError(*_CODE)


def _load_tensors(file: Any, *args: Any, **options: Any) -> Any:
    try:
        return _torch_load(file, *args, **{**options, "weights_only": True})
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch alone raises five kinds
        raise RefusedFileError(
            f"{_name(file)} is damaged, or holds more than tensors", "copy it again, or convert it to safetensors"
        ) from error


def _name(file: object) -> str:
    return os.fspath(file) if isinstance(file, str | os.PathLike) else "a file"
