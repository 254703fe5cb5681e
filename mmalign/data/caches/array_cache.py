"""Arrays on disk by key: dicts of tensors that are costly to make, in safetensors shards that are mapped, not loaded.

The cache stores and finds; it never encodes. What is made in another way lies in another folder, whose name says so.
Several processes may write to one folder: each `put` is a file of its own, complete under its name or absent. A process
sees what it has put and what lay there at `open` or `refresh`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import Data

_FINGERPRINT = "fingerprint.json"


_STALE = 3600.0  # seconds after which an unfinished file has no writer any more


_CHUNK = 2**16  # numbers that are added up together for a fingerprint


Fingerprint = Mapping[str, str | int | float]


class ArrayCache:
    """A folder of arrays made by one model in one way. Get one with `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._fields: list[tuple[str, ...]] = []  # of every shard
        self._index: dict[str, int] = {}  # key -> shard
        self._handles: dict[int, Any] = {}
        self._process = os.getpid()

    @classmethod
    def open(cls, folder: str | Path, fingerprint: Fingerprint) -> ArrayCache:
        """Open the cache of this fingerprint within a folder, or make it; each fingerprint has one of its own.

        Args:
            folder: where caches of one kind are.
            fingerprint: what the arrays depend on besides their keys: model, resolution, dtype ...

        Raises:
            ValueError: the folder is a file, or the cache's own holds something else.
        """
        wanted = json.loads(json.dumps(dict(fingerprint)))
        name = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()
        cache = cls(Path(folder) / name)
        for path in (Path(folder), cache.folder):
            if path.exists() and not path.is_dir():
                raise ValueError(f"data.cache: {path} is a file; expected a folder, or a name that is free")
        cache.folder.mkdir(parents=True, exist_ok=True)
        _check_fingerprint(cache.folder, wanted)
        cache.refresh()
        return cache

    def refresh(self) -> None:
        """Find what other processes have put since; remove what a crash left unfinished."""
        for unfinished in self.folder.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - unfinished.stat().st_mtime > _STALE:
                    unfinished.unlink()
        known = set(self._shards)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            names = _names(path)
            if names is None:
                path.unlink(missing_ok=True)
            else:
                self._add(path, names)

    def put(self, items: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store one shard: some hundred items make a good one. Every item has the same fields.

        Raises:
            OSError: the disk is full or not writable; nothing of the shard is left, everything before it is.
        """
        from safetensors.torch import save

        if not items:
            return
        assert not any("|" in field for item in items.values() for field in item), "| ends the key in a tensor's name"
        tensors = {f"{key}|{f}": x.detach().cpu().contiguous() for key, item in items.items() for f, x in item.items()}
        assert len({frozenset(item) for item in items.values()}) == 1, "items of one shard have the same fields"
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            size, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno,
                f"data.cache: {self.folder}: could not write {size / 1e6:,.1f} MB ({error.strerror}; "
                f"{free / 1e6:,.1f} MB are free); make room and run again, what was stored before is kept",
            ) from error
        self._add(path, list(tensors))

    def get(self, key: str) -> dict[str, Tensor]:
        """The arrays stored under a key.

        Raises:
            KeyError: there are none.
        """
        shard = self._index[key]
        if self._process != os.getpid():  # a forked worker opens its own
            self._handles, self._process = {}, os.getpid()
        if shard not in self._handles:
            from safetensors import safe_open

            self._handles[shard] = safe_open(self._shards[shard], "pt")
        return {field: self._handles[shard].get_tensor(f"{key}|{field}") for field in self._fields[shard]}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not stored, in order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def share(self, keys: Iterable[str], *, rank: int, world_size: int) -> list[str]:
        """Those of the keys that are not stored and that process `rank` of `world_size` is to make, in order.

        The keys are dealt out in turn, by their place among all of them and not among what is missing: another process
        may have stored some of its own already, and so see a shorter list. Every process is to ask for the same keys.
        """
        return self.missing(list(dict.fromkeys(keys))[rank::world_size])

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _add(self, path: Path, names: list[str]) -> None:
        split = [name.rpartition("|") for name in names]
        self._fields.append(tuple(dict.fromkeys(field for _, _, field in split)))
        self._index.update(dict.fromkeys((key for key, _, _ in split), len(self._shards)))
        self._shards.append(path)


def fingerprint_tensors(state: Mapping[str, Tensor]) -> str:
    """Thirty-two hex digits of names, shapes, dtypes and every byte: the identity of a model's weights.

    The bytes are taken as integers, multiplied by odd random ones of 64 bits, and added up, some at a time, wherever
    the tensors are: the same on every device. A change of one integer always shows, one of several but for one case in
    2 ** 31 at worst (which multiples of 2 ** 64 a random sum hits), and a model of many gigabytes takes seconds.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator, dtype=torch.int64) | 1
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if factors.device != tensor.device:
            factors = factors.to(tensor.device)
        sums = [(part * factors[: len(part)]).sum() for part in torch.split(_integers(tensor), _CHUNK) if len(part)]
        if sums:
            digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _integers(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, four by four where they come out even, each as an integer."""
    whole = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(whole) % 4:
        return whole
    return (whole.clone() if whole.storage_offset() % 4 else whole).view(torch.int32)


def _check_fingerprint(folder: Path, expected: dict[str, Any]) -> None:
    path = folder / _FINGERPRINT
    if not path.exists():
        if any(folder.iterdir()) and not any(folder.glob(f"{_FINGERPRINT}*")):
            raise ValueError(f"data.cache: {folder} holds other files; expected an empty folder, or a free name")
        part = folder / f"{_FINGERPRINT}.{uuid.uuid4().hex}"
        part.write_text(json.dumps(expected, indent=1))
        part.replace(path)
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data.cache: {path} is not JSON; delete the folder to make it anew") from error
    differing = sorted(k for k in expected.keys() | stored.keys() if expected.get(k) != stored.get(k))
    if differing:
        differences = "; ".join(f"{k} is {stored.get(k)!r} there and {expected.get(k)!r} here" for k in differing)
        raise ValueError(f"data.cache: {folder} is not what its name says: {differences}; delete the folder")


def _names(path: Path) -> list[str] | None:
    """The tensors of a shard by its header, or None if the file has been cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > size - 8:
                return None
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError):
        return None
    return list(header) if 8 + length + end == size else None


def cache_folder(data: Data, output: Path) -> Path:
    """Where a recipe's caches are, if it has any; `output` is the recipe's."""
    return output / "cache" if data.cache == "auto" else Path(data.cache)
